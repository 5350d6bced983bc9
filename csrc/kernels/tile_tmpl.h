/* A table of kernels from templates that are written once for all ISAs and reals.
 *
 * Formulas, shapes and layouts: kernels.h. An isa/ file includes this after a header of simd/, and
 * defines before both
 *
 *     REAL_BITS        32: real is float; 64: double
 *     QKV_ISA          the ISA's name, a string
 *     QKV_TABLE        the name of the table, qkv_tile_kernels_<input type>_<isa>
 *     QKV_TARGET       the compiler's names of the features used (see isa/x86_table.h)
 *     QKV_PAIRS        if defined, inputs are bfloat16, in pairs
 *     QKV_QUADS        if defined, in quads (and QKV_PAIRS too)
 *     QKV_MATRIX_UNIT  if defined, a matrix unit multiplies them
 *
 * A *_tmpl.h is part of every table; of product_*.h and inputs_*.h, a table has one each. */
#include "../runtime/convert.h"
#include "../runtime/elements.h"
#include "kernels.h"

#include <string.h>

#include "../simd/fallbacks.h"
#include "common.h"
#include "exp2.h"

#ifdef QKV_PAIRS
#define ROUGH_EXP2 1
#define MULTIPLY_ADD(a, b, c) v_dot_pairs(a, b, c)
#define MULTIPLY_ADD_SCALAR(a, b, c) v_dot_pairs(a, b, c)
#define MULTIPLY_ADD_FLOP 4
#else
#define ROUGH_EXP2 0
#define MULTIPLY_ADD(a, b, c) v_fma(a, b, c)
#define MULTIPLY_ADD_SCALAR(a, b, c) v_fma_scalar(a, b, c)
#define MULTIPLY_ADD_FLOP 2
#endif
#ifdef QKV_MATRIX_UNIT
#include "product_matrix.h"
#elif defined(QKV_QUADS)
#include "product_quads.h"
#else
#include "product_lanes.h"
#endif
#ifdef QKV_PAIRS
#include "inputs_bf16.h"
#else
#include "decode_tmpl.h"
#include "inputs_real.h"
#endif
#include "modifiers_tmpl.h"
#include "masks_tmpl.h"
#include "softmax_tmpl.h"
#include "statistics_tmpl.h"
#include "rows_tmpl.h"
#include "fold_tmpl.h"
#include "merge_tmpl.h"

const qkv_tile_kernels QKV_TABLE = {
    .isa = QKV_ISA,
    .real_bytes = sizeof(real),
    .input_type = INPUT_TYPE,
    .lanes = LANES,
    .tile_q = TILE_Q,
    .depth_step = DEPTH_STEP,
    .row_step = ROW_STEP,
    .depth_group = DEPTH_GROUP,
    .enter = ENTER,
    .leave = LEAVE,
    .pack_rows = pack_rows,
    .pack_values = PACK_VALUES,
    .scores = scores,
    .scale = scale,
    .softcap = softcap,
    .alibi = alibi,
    .bias = bias,
    .mask_bool = mask_bool,
    .softmax = softmax,
    .statistics = statistics,
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
    .merge_rows = merge_rows,
    .fma_chain = fma_chain,
    .fma_chain_flop = FMA_CHAIN_FLOP,
};
