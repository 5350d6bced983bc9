/* Powers of 2 by minimax polynomials, in lanes.
 *
 *     exp2_slope(x)       = (2^x - 1) / x                for |x| <= 1/2
 *     exp2_nonpositive(x) = 2^n * (1 + f * slope(f))     for x <= 0, n = floor(x), f = x - n
 */

/* The relative error of 1 + x * exp2_slope(x) against 2^x is 2e-9 in float and 4e-18 in double.
 * tanh needs that on both sides of 0. */
INLINE vec exp2_slope(vec x)
{
#if REAL_BITS == 32
    vec g = v_set1(0.00015353360629290430159f);
    g = v_fma(g, x, v_set1(0.0013398874866602267857f));
    g = v_fma(g, x, v_set1(0.0096184373664188702776f));
    g = v_fma(g, x, v_set1(0.05550332469693873224f));
    g = v_fma(g, x, v_set1(0.24022647913498998415f));
    return v_fma(g, x, v_set1(0.6931472028559704008f));
#else
    vec g = v_set1(4.4347708103775016192e-10);
    g = v_fma(g, x, v_set1(7.0737832854020625769e-9));
    g = v_fma(g, x, v_set1(1.0178199575306790032e-7));
    g = v_fma(g, x, v_set1(1.3215435282068186062e-6));
    g = v_fma(g, x, v_set1(0.000015252733493118438132));
    g = v_fma(g, x, v_set1(0.00015403530457112641239));
    g = v_fma(g, x, v_set1(0.001333355814677463106));
    g = v_fma(g, x, v_set1(0.0096181291075941195762));
    g = v_fma(g, x, v_set1(0.055504108664820083176));
    g = v_fma(g, x, v_set1(0.24022650695910131262));
    return v_fma(g, x, v_set1(0.69314718055994532581));
#endif
}

/* The relative error is 2e-9 in float and 3e-18 in double. A rough one, 3e-6, is enough if the
 * result is rounded to bfloat16, which takes 4e-3. A result below the smallest normal number is 0:
 * arithmetic on subnormals is slow, and they are below the rounding of a row whose largest weight
 * is 1. NaN stays NaN. */
INLINE vec exp2_nonpositive(vec x, const int rough)
{
    vec n;
    const vec f = v_fraction(x, &n);
#if REAL_BITS == 32
    vec g = v_set1(rough ? 0.013426682640086255951f : 0.00021612910951221658911f);
    if (!rough) {
        g = v_fma(g, f, v_set1(0.0012467847551207965361f));
        g = v_fma(g, f, v_set1(0.0096754514550593455974f));
    }
    g = v_fma(g, f, v_set1(rough ? 0.052242477222727445026f : 0.055485280669814803464f));
    g = v_fma(g, f, v_set1(rough ? 0.24128020318582252272f : 0.24022930554164043771f));
    g = v_fma(g, f, v_set1(rough ? 0.69304484511709280257f : 0.69314704444416419636f));
#else
    vec g = v_set1(6.2634646009761470802e-10);
    (void)rough;
    g = v_fma(g, f, v_set1(6.5595301896210069816e-9));
    g = v_fma(g, f, v_set1(1.0253212223905222794e-7));
    g = v_fma(g, f, v_set1(1.3208367318424936942e-6));
    g = v_fma(g, f, v_set1(0.00001525317505299179206));
    g = v_fma(g, f, v_set1(0.00015403512309774436912));
    g = v_fma(g, f, v_set1(0.0013333558629561369834));
    g = v_fma(g, f, v_set1(0.0096181290995509217695));
    g = v_fma(g, f, v_set1(0.055504108665602235701));
    g = v_fma(g, f, v_set1(0.24022650695906330332));
    g = v_fma(g, f, v_set1(0.69314718055994592839));
#endif
    return v_ldexp_or_zero(v_fma(g, f, v_set1(1)), n);
}
