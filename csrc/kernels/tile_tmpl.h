/* The tile kernels, written once. Include after a simd/ header, which defines `real`, `vec`,
 * LANES, STRIP (vectors in a register tile) and rows_of(nv), the rows that fill the registers;
 * QKV_TABLE names the table that is exported, QKV_ISA its ISA, QKV_PAIRS that operands are bfloat16,
 * QKV_MATRIX_UNIT that a matrix unit multiplies them. Formulas: kernels.h. */
#include "../runtime/convert.h"
#include "../runtime/elements.h"
#include "kernels.h"

#include <string.h>

#include "../simd/fallbacks.h"
#include "common.h"
#include "exp2.h"

#ifdef QKV_PAIRS
#define ROUGH 1
#define MULTIPLY_ADD(a, b, c) v_dot_pairs(a, b, c)
#define MULTIPLY_ADD_FLOP 4
#else
#define ROUGH 0
#define MULTIPLY_ADD(a, b, c) v_fma(a, b, c)
#define MULTIPLY_ADD_FLOP 2
#endif
#ifdef QKV_MATRIX_UNIT
#include "product_matrix.h"
#else
#include "product_lanes.h"
#endif
#ifdef QKV_PAIRS
#include "inputs_bf16.h"
#else
#include "inputs_real.h"
#endif
#include "modifiers_tmpl.h"
#include "masks_tmpl.h"
#include "softmax_tmpl.h"
#include "rows_tmpl.h"
#include "fold_tmpl.h"

const qkv_tile_kernels QKV_TABLE = {
    .isa = QKV_ISA,
    .real_bytes = sizeof(real),
    .input_type = INPUT_TYPE,
    .lanes = LANES,
    .tile_q = TILE_Q,
    .depth_step = DEPTH_STEP,
    .row_step = ROW_STEP,
    .enter = ENTER,
    .leave = LEAVE,
    .pack_rows = pack_rows,
    .pack_values = PACK_VALUES,
    .scores = scores,
    .scale = scale,
    .softcap = softcap,
    .alibi = alibi,
    .bias = bias,
    .mask_positions = mask_positions,
    .mask_bool = mask_bool,
    .softmax = softmax,
    .accumulate = accumulate,
    .accumulate_nonfinite = accumulate_nonfinite,
    .scale_keys = scale_keys,
    .all_finite = all_finite,
    .store_rows = store_rows,
    .fold = fold,
    .decode_scores = DECODE_SCORES,
    .decode_softmax = DECODE_SOFTMAX,
    .decode_accumulate = DECODE_ACCUMULATE,
    .widen = WIDEN,
    .narrow = NARROW,
    .fma_chain = fma_chain,
    .fma_chain_flop = FMA_CHAIN_FLOP,
};
