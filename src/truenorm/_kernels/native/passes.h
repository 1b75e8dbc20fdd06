/* The four passes over a part of the data. Included once for each type of values; values.h explains
 * VALUE, SUM and the other macros.
 *
 * Wherever x is normalised it is written with the same FMA, so that the backward pass of a ReLU
 * finds the same signs again as the forward pass.
 */

/* A pass works on tiles: rows x width values, of which a row begins `step` values after the one
 * before it. Where the channels are last, a tile is some rows of the array, and a column is a
 * channel. Where they are first, all of a tile is of one channel and one sample: its values are
 * dealt out in rows to columns whose constants are equal, so that the same loops serve both. */

/* first += x - mean, second += (x - mean)^2. */
static void NAME(moments)(const VALUE *restrict x, int64_t rows, int64_t width, int64_t step,
                          const COLUMNS *k)
{
    const SUM *restrict mean = k->mean;
    SUM *restrict first = k->first, *restrict second = k->second;
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4, x += 4 * step)
        for (int64_t c = 0; c < width; c++) {
            SUM d[4];
            for (int i = 0; i < 4; i++) d[i] = LOAD(x[i * step + c]) - mean[c];
            first[c] += (d[0] + d[1]) + (d[2] + d[3]);
            second[c] += FMA(d[0], d[0], d[1] * d[1]) + FMA(d[2], d[2], d[3] * d[3]);
        }
    for (; r < rows; r++, x += step)
        for (int64_t c = 0; c < width; c++) {
            SUM d = LOAD(x[c]) - mean[c];
            first[c] += d;
            second[c] = FMA(d, d, second[c]);
        }
}

/* first += h, second += h (x - mean), where h is the gradient that reaches the output before the
 * ReLU: dy, or 0 where the ReLU had no positive output. Where the output is given, it has the
 * signs, and h is written down: the next pass reads it in the place of dy. */
static ALWAYS_INLINE void NAME(products)(const VALUE *restrict x, const VALUE *restrict dy,
                                         const VALUE *restrict out, VALUE *restrict dadd,
                                         int64_t rows, int64_t width, int64_t step,
                                         const COLUMNS *k, const int relu, const int given)
{
    const SUM *restrict mean = k->mean, *restrict scale = k->scale, *restrict offset = k->offset;
    SUM *restrict first = k->first, *restrict second = k->second;
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4, x += 4 * step, dy += 4 * step)
        for (int64_t c = 0; c < width; c++) {
            SUM d[4], h[4];
            for (int i = 0; i < 4; i++) {
                const int64_t at = (r + i) * step + c;
                d[i] = LOAD(x[i * step + c]) - mean[c], h[i] = LOAD(dy[i * step + c]);
                if (relu) h[i] = FMA(d[i], scale[c], offset[c]) > 0 ? h[i] : 0;
                if (given) h[i] = LOAD(out[at]) > 0 ? h[i] : 0, dadd[at] = STORE(h[i]);
            }
            first[c] += (h[0] + h[1]) + (h[2] + h[3]);
            second[c] += FMA(h[0], d[0], h[1] * d[1]) + FMA(h[2], d[2], h[3] * d[3]);
        }
    for (; r < rows; r++, x += step, dy += step)
        for (int64_t c = 0; c < width; c++) {
            SUM d = LOAD(x[c]) - mean[c], h = LOAD(dy[c]);
            if (relu) h = FMA(d, scale[c], offset[c]) > 0 ? h : 0;
            if (given) h = LOAD(out[r * step + c]) > 0 ? h : 0, dadd[r * step + c] = STORE(h);
            first[c] += h;
            second[c] = FMA(h, d, second[c]);
        }
}

/* y = (x - mean) scale + offset, plus `add` if it is given, then ReLU if asked for. `alike`: all
 * columns have the constants of the first. */
static ALWAYS_INLINE void NAME(normalize)(const VALUE *restrict x, const VALUE *restrict add,
                                          VALUE *restrict y, int64_t rows, int64_t width,
                                          int64_t step, const COLUMNS *k, const int given,
                                          const int alike, const int relu)
{
    const SUM *restrict mean = k->mean, *restrict scale = k->scale, *restrict offset = k->offset;
    for (int64_t r = 0; r < rows; r++, x += step, y += step)
        for (int64_t c = 0; c < width; c++) {
            const int64_t a = alike ? 0 : c;
            SUM v = FMA(LOAD(x[c]) - mean[a], scale[a], offset[a]);
            if (given) v += LOAD(add[r * step + c]);
            if (relu) v = v < 0 ? 0 : v; /* NaN stays NaN */
            y[c] = STORE(v);
        }
}

/* dx = h scale + (x - mean) slope + level, with the h of products. */
static ALWAYS_INLINE void NAME(gradient)(const VALUE *restrict x, const VALUE *restrict dy,
                                         VALUE *restrict dx, int64_t rows, int64_t width,
                                         int64_t step, const COLUMNS *k, const int alike,
                                         const int relu)
{
    const SUM *restrict mean = k->mean, *restrict scale = k->scale, *restrict offset = k->offset;
    const SUM *restrict slope = k->slope, *restrict level = k->level;
    for (int64_t r = 0; r < rows; r++, x += step, dy += step, dx += step)
        for (int64_t c = 0; c < width; c++) {
            const int64_t a = alike ? 0 : c;
            SUM d = LOAD(x[c]) - mean[a], h = LOAD(dy[c]);
            if (relu) h = FMA(d, scale[a], offset[a]) > 0 ? h : 0;
            dx[c] = STORE(FMA(h, scale[a], FMA(d, slope[a], level[a])));
        }
}

/* A shift for the first block, which has no mean so far: the mean of the first `few` rows that
 * count, itself computed relative to the first of them. A row begins `step` values after the one
 * before it. Leaves the sums at zero. */
static void NAME(first_shift)(const VALUE *x, const uint8_t *mask, int64_t rows, int64_t few,
                              int64_t width, int64_t step, SUM *shift, SUM *sums)
{
    int64_t taken = 0;
    for (int64_t r = 0; r < rows && taken < few; r++) {
        const VALUE *row = x + r * step;
        if (mask && !mask[r]) continue;
        if (taken++ == 0)
            for (int64_t c = 0; c < width; c++) shift[c] = LOAD(row[c]), sums[c] = 0;
        for (int64_t c = 0; c < width; c++) sums[c] += LOAD(row[c]) - shift[c];
    }
    for (int64_t c = 0; c < width; c++) shift[c] += sums[c] / (SUM)taken, sums[c] = 0;
}

/* One pass over the tile that begins at value number `at` of the array. With and without ReLU or a
 * sum, and for columns alike or not, the pass is compiled separately: no loop asks for what stays
 * the same. */
static void NAME(tile)(const job *j, pass_kind pass, int64_t at, int64_t rows, int64_t width,
                       int64_t step, const COLUMNS *k)
{
    const tn_call *call = j->call;
    const VALUE *x = (const VALUE *)call->x + at;
    const void *later = pass == GRADIENT && call->dadd ? call->dadd : call->dy;
    const VALUE *dy = later ? (const VALUE *)later + at : NULL;
    const VALUE *add = call->add ? (const VALUE *)call->add + at : NULL;
    const VALUE *out = call->out ? (const VALUE *)call->out + at : NULL;
    VALUE *y = call->y ? (VALUE *)call->y + at : NULL;
    VALUE *dadd = call->dadd ? (VALUE *)call->dadd + at : NULL;
    const int relu = call->relu != 0 && !out, alike = call->inner != 1;
#define FOR_RELU(f, ...) (relu ? f(__VA_ARGS__, 1) : f(__VA_ARGS__, 0))
#define FOR_BOTH(f, ...) (alike ? FOR_RELU(f, __VA_ARGS__, 1) : FOR_RELU(f, __VA_ARGS__, 0))
    switch (pass) {
    case MOMENTS: NAME(moments)(x, rows, width, step, k); break;
    case PRODUCTS:
        if (out) NAME(products)(x, dy, out, dadd, rows, width, step, k, 0, 1);
        else if (relu) NAME(products)(x, dy, NULL, NULL, rows, width, step, k, 1, 0);
        else NAME(products)(x, dy, NULL, NULL, rows, width, step, k, 0, 0);
        break;
    case NORMALIZE:
        if (add) FOR_BOTH(NAME(normalize), x, add, y, rows, width, step, k, 1);
        else FOR_BOTH(NAME(normalize), x, NULL, y, rows, width, step, k, 0);
        break;
    case GRADIENT: FOR_BOTH(NAME(gradient), x, dy, y, rows, width, step, k); break;
    case NO_PASS: break;
    }
#undef FOR_RELU
#undef FOR_BOTH
}
