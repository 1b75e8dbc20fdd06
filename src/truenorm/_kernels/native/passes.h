/* The passes over the data for one type of values, VALUE, with sums in SUM; included once for each.
 *
 * NAME(f) is the name of f for this type, LOAD and STORE convert, and FMA(a, b, c) is a * b + c,
 * rounded the same way wherever it stands: the backward pass of ReLU has to find the same signs.
 */

/* Constants of each column of a tile, and its sums. */
typedef struct {
    const SUM *mean, *scale, *offset, *slope, *level;
    SUM *first, *second;
} NAME(columns);

/* A tile: rows x width values, row after row. Channels last it is rows of the array; channels first
 * a part of one sample's channel made one, of columns with equal constants. */

/* first += x - mean, second += (x - mean)^2. */
static void NAME(moments)(const VALUE *restrict x, int64_t rows, int64_t width, NAME(columns) k)
{
    const SUM *restrict mean = k.mean;
    SUM *restrict first = k.first, *restrict second = k.second;
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4, x += 4 * width)
        for (int64_t c = 0; c < width; c++) {
            SUM d[4];
            for (int i = 0; i < 4; i++) d[i] = LOAD(x[i * width + c]) - mean[c];
            first[c] += (d[0] + d[1]) + (d[2] + d[3]);
            second[c] += FMA(d[0], d[0], d[1] * d[1]) + FMA(d[2], d[2], d[3] * d[3]);
        }
    for (; r < rows; r++, x += width)
        for (int64_t c = 0; c < width; c++) {
            SUM d = LOAD(x[c]) - mean[c];
            first[c] += d;
            second[c] = FMA(d, d, second[c]);
        }
}

/* h = dy, or where a ReLU follows what it lets through. first += h, second += h (x - mean). */
static ALWAYS_INLINE void NAME(products)(const VALUE *restrict x, const VALUE *restrict dy,
                                         int64_t rows, int64_t width, NAME(columns) k,
                                         const int relu)
{
    const SUM *restrict mean = k.mean, *restrict scale = k.scale, *restrict offset = k.offset;
    SUM *restrict first = k.first, *restrict second = k.second;
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4, x += 4 * width, dy += 4 * width)
        for (int64_t c = 0; c < width; c++) {
            SUM d[4], h[4];
            for (int i = 0; i < 4; i++) {
                d[i] = LOAD(x[i * width + c]) - mean[c], h[i] = LOAD(dy[i * width + c]);
                if (relu) h[i] = FMA(d[i], scale[c], offset[c]) > 0 ? h[i] : 0;
            }
            first[c] += (h[0] + h[1]) + (h[2] + h[3]);
            second[c] += FMA(h[0], d[0], h[1] * d[1]) + FMA(h[2], d[2], h[3] * d[3]);
        }
    for (; r < rows; r++, x += width, dy += width)
        for (int64_t c = 0; c < width; c++) {
            SUM d = LOAD(x[c]) - mean[c], h = LOAD(dy[c]);
            if (relu) h = FMA(d, scale[c], offset[c]) > 0 ? h : 0;
            first[c] += h;
            second[c] = FMA(h, d, second[c]);
        }
}

/* y = (x - mean) scale + offset, and ReLU of it; `alike`: the first column's constants are all. */
static ALWAYS_INLINE void NAME(normalize)(const VALUE *restrict x, VALUE *restrict y, int64_t rows,
                                          int64_t width, NAME(columns) k, const int relu,
                                          const int alike)
{
    const SUM *restrict mean = k.mean, *restrict scale = k.scale, *restrict offset = k.offset;
    for (int64_t r = 0; r < rows; r++, x += width, y += width)
        for (int64_t c = 0; c < width; c++) {
            const int64_t a = alike ? 0 : c;
            SUM v = FMA(LOAD(x[c]) - mean[a], scale[a], offset[a]);
            if (relu) v = v < 0 ? 0 : v; /* a NaN stays one */
            y[c] = STORE(v);
        }
}

/* dx = h scale + (x - mean) slope + level. */
static ALWAYS_INLINE void NAME(gradient)(const VALUE *restrict x, const VALUE *restrict dy,
                                         VALUE *restrict dx, int64_t rows, int64_t width,
                                         NAME(columns) k, const int relu, const int alike)
{
    const SUM *restrict mean = k.mean, *restrict scale = k.scale, *restrict offset = k.offset;
    const SUM *restrict slope = k.slope, *restrict level = k.level;
    for (int64_t r = 0; r < rows; r++, x += width, dy += width, dx += width)
        for (int64_t c = 0; c < width; c++) {
            const int64_t a = alike ? 0 : c;
            SUM d = LOAD(x[c]) - mean[a], h = LOAD(dy[c]);
            if (relu) h = FMA(d, scale[a], offset[a]) > 0 ? h : 0;
            dx[c] = STORE(FMA(h, scale[a], FMA(d, slope[a], level[a])));
        }
}

static void NAME(tile)(const job *j, int pass, int64_t at, int64_t rows, int64_t width,
                       NAME(columns) k)
{
    const VALUE *x = (const VALUE *)j->call->x + at;
    const VALUE *dy = j->call->dy ? (const VALUE *)j->call->dy + at : NULL;
    VALUE *y = j->call->y ? (VALUE *)j->call->y + at : NULL;
    const int alike = j->call->inner != 1;
#define EACH(relu, alike) ((relu) * 2 + (alike))
    if (pass == MOMENTS) {
        NAME(moments)(x, rows, width, k);
        return;
    }
    if (pass == PRODUCTS) {
        if (j->call->relu) NAME(products)(x, dy, rows, width, k, 1);
        else NAME(products)(x, dy, rows, width, k, 0);
        return;
    }
    switch (EACH(j->call->relu ? 1 : 0, alike) + (pass == GRADIENT ? 4 : 0)) {
    case EACH(0, 0): NAME(normalize)(x, y, rows, width, k, 0, 0); break;
    case EACH(0, 1): NAME(normalize)(x, y, rows, width, k, 0, 1); break;
    case EACH(1, 0): NAME(normalize)(x, y, rows, width, k, 1, 0); break;
    case EACH(1, 1): NAME(normalize)(x, y, rows, width, k, 1, 1); break;
    case EACH(0, 0) + 4: NAME(gradient)(x, dy, y, rows, width, k, 0, 0); break;
    case EACH(0, 1) + 4: NAME(gradient)(x, dy, y, rows, width, k, 0, 1); break;
    case EACH(1, 0) + 4: NAME(gradient)(x, dy, y, rows, width, k, 1, 0); break;
    case EACH(1, 1) + 4: NAME(gradient)(x, dy, y, rows, width, k, 1, 1); break;
    }
#undef EACH
}

/* The mean of the first `few` rows that count, itself taken around one of them: a shift for what has
 * no mean yet. The sums are left at zero. */
static void NAME(first_shift)(const VALUE *x, const uint8_t *mask, int64_t rows, int64_t few,
                              int64_t width, SUM *shift, SUM *sums)
{
    int64_t taken = 0;
    for (int64_t r = 0; r < rows && taken < few; r++) {
        if (mask && !mask[r]) continue;
        if (taken++ == 0)
            for (int64_t c = 0; c < width; c++) shift[c] = LOAD(x[r * width + c]), sums[c] = 0;
        for (int64_t c = 0; c < width; c++) sums[c] += LOAD(x[r * width + c]) - shift[c];
    }
    for (int64_t c = 0; c < width; c++) shift[c] += sums[c] / (SUM)taken, sums[c] = 0;
}

/* Joins the sums of a block to those of the `before` values before it, in double.
 *
 * Moments as count, mean and M2 (Chan, Golub and LeVeque, 1983). The next block is shifted by the
 * mean so far; where that is not the block's own, the sum of squares cancels only against what the
 * distance of the two adds to M2 anyway. */
static void NAME(join)(int pass, int64_t width, double before, double size, NAME(columns) k,
                       SUM *restrict shift, double *restrict first, double *restrict second)
{
    if (pass == PRODUCTS) {
        for (int64_t c = 0; c < width; c++) first[c] += k.first[c], second[c] += k.second[c];
        return;
    }
    const double part = size / (before + size), weight = before * part, inverse = 1 / size;
    for (int64_t c = 0; c < width; c++) {
        double step = k.first[c] * inverse, inside = k.second[c] - k.first[c] * step;
        double delta = (shift[c] - first[c]) + step;
        second[c] += (inside < 0 ? 0 : inside) + delta * delta * weight;
        first[c] += delta * part;
        shift[c] = (SUM)first[c];
    }
}

/* Channels last: a chunk is some of the rows, with sums of its own. */
static void NAME(rows)(job *j, int pass, int64_t chunk, void *scratch)
{
    const tn_call *call = j->call;
    const int64_t width = call->channels, start = share(call->outer, chunk, j->chunks);
    const int64_t end = share(call->outer, chunk + 1, j->chunks);
    const SUM *constants = j->constants;
    SUM *sums = scratch, *shift = sums + 2 * width;
    double *total = j->sums + 2 * width * chunk;
    NAME(columns) k = {call->mean, constants, constants + width, constants + 2 * width,
                       constants + 3 * width, sums, sums + width};
    if (pass == MOMENTS) k.mean = shift;
    const uint8_t *mask = pass == MOMENTS || pass == GRADIENT ? call->mask : NULL;
    NAME(columns) apart = k; /* The statistics do not depend on rows that do not count. */
    apart.slope = apart.level = constants + 4 * width;
    if (pass == NORMALIZE || pass == GRADIENT) {
        for (int64_t row = start, rows; row < end; row += rows) {
            rows = run_length(mask, row, end);
            NAME(tile)(j, pass, row * width, rows, width, mask && !mask[row] ? apart : k);
        }
        return;
    }
    for (int64_t c = 0; c < 2 * width; c++) total[c] = 0;
    for (int64_t row = start, seen = 0, size = 0; row < end; seen += size, size = 0) {
        const int64_t last = least(row + BLOCK, end);
        for (int64_t c = 0; c < 2 * width; c++) sums[c] = 0;
        for (int64_t rows; row < last; row += rows) {
            rows = run_length(mask, row, last);
            if (mask && !mask[row]) continue;
            if (pass == MOMENTS && seen + size == 0)
                NAME(first_shift)((const VALUE *)call->x + row * width, mask ? mask + row : NULL,
                                  last - row, 8, width, shift, sums);
            NAME(tile)(j, pass, row * width, rows, width, k);
            size += rows;
        }
        if (size) NAME(join)(pass, width, (double)seen, (double)size, k, shift, total, total + width);
    }
}

/* Channels first: a chunk is some of the channels, of all samples. What has sums is taken in rows of
 * LANES columns, with equal constants: those of a few channels at a time, so that memory is read in
 * its order, and of up to SEVERAL values of
 * each, if a sample has fewer: of more and more, since at first the shift is that of a few. */
static void NAME(slices)(job *j, int pass, int64_t chunk, void *scratch)
{
    const tn_call *call = j->call;
    const VALUE *x = call->x;
    const int64_t channels = call->channels, inner = call->inner;
    const int64_t start = share(channels, chunk, j->chunks);
    const int64_t end = share(channels, chunk + 1, j->chunks);
    const SUM *means = call->mean, *scales = j->constants, *offsets = scales + channels;
    SUM *shifts = scratch, *lanes = shifts + channels;
    if (pass == NORMALIZE || pass == GRADIENT) {
        for (int64_t n = 0; n < call->outer; n++)
            for (int64_t c = start; c < end; c++) {
                NAME(columns) one = {means + c, scales + c, offsets + c, offsets + channels + c,
                                     offsets + 2 * channels + c, NULL, NULL};
                NAME(tile)(j, pass, (n * channels + c) * inner, 1, inner, one);
            }
        return;
    }
    for (int64_t c = start; c < end; c++) {
        j->sums[c] = j->sums[channels + c] = 0;
        if (pass == MOMENTS && call->outer * inner > 0)
            NAME(first_shift)(x + c * inner, NULL, inner, LANES, 1, shifts + c, lanes);
    }
    const int64_t piece = least(inner, BLOCK * LANES), samples = most(1, SEVERAL / most(1, inner));
    for (int64_t group = start; group < end; group += GROUP)
        for (int64_t n = 0, some = 1; n < call->outer; n += some, some = least(2 * some, samples))
            for (int64_t p = 0; p < inner; p += piece) {
                const int64_t last = least(n + some, call->outer), size = least(piece, inner - p);
                NAME(columns) of[GROUP];
                const int count = (int)least(GROUP, end - group);
                for (int i = 0; i < count; i++) {
                    SUM *own = lanes + i * 5 * LANES;
                    const int64_t c = group + i;
                    const SUM mean = pass == MOMENTS ? shifts[c] : means[c];
                    for (int l = 0; l < LANES; l++) {
                        own[l] = mean, own[LANES + l] = scales[c], own[2 * LANES + l] = offsets[c];
                        own[3 * LANES + l] = own[4 * LANES + l] = 0;
                    }
                    of[i] = (NAME(columns)){.mean = own, .scale = own + LANES,
                                            .offset = own + 2 * LANES, .first = own + 3 * LANES,
                                            .second = own + 4 * LANES};
                }
                for (int64_t sample = n; sample < last; sample++)
                    for (int i = 0; i < count; i++) {
                        const int64_t at = (sample * channels + group + i) * inner + p;
                        const int64_t rest = size % LANES;
                        NAME(tile)(j, pass, at, size / LANES, LANES, of[i]);
                        if (rest) NAME(tile)(j, pass, at + size - rest, 1, rest, of[i]);
                    }
                for (int i = 0; i < count; i++) {
                    double both[2] = {0, 0}, *sums = j->sums + group + i;
                    for (int l = 0; l < LANES; l++) both[0] += of[i].first[l], both[1] += of[i].second[l];
                    of[i].first[0] = (SUM)both[0], of[i].second[0] = (SUM)both[1];
                    NAME(join)(pass, 1, (double)(n * inner + p), (double)((last - n) * size), of[i],
                               shifts + group + i, sums, sums + channels);
                }
            }
}

/* One step of the moving statistics toward the batch's. */
static void NAME(move)(const job *j, const double *means, const double *m2)
{
    const tn_call *call = j->call;
    const SUM *mean = call->mean, *variance = call->variance;
    const SUM *old_mean = call->moving_mean, *old_variance = call->moving_variance;
    SUM *new_mean = call->moved_mean, *new_variance = call->moved_variance;
    const double m = call->momentum, count = (double)j->count;
    for (int64_t c = 0; c < call->channels; c++) {
        int finite = isfinite(mean[c]) && isfinite(variance[c]);
        double next = m2[c] / (call->unbiased ? count - 1 : count);
        new_mean[c] = finite && count > 0 ? (SUM)(m * old_mean[c] + (1 - m) * means[c]) : old_mean[c];
        new_variance[c] =
            finite && count > 1 ? (SUM)(m * old_variance[c] + (1 - m) * next) : old_variance[c];
    }
}

/* From the moments of all chunks to the statistics, and to the constants of the next pass. */
static void NAME(finish_moments)(job *j)
{
    const tn_call *call = j->call;
    const int64_t channels = call->channels;
    SUM *mean = call->mean, *variance = call->variance, *low = call->low, *rstd = call->rstd;
    const SUM *moving_mean = call->moving_mean, *moving_variance = call->moving_variance;
    const int given = j->count == 0 && moving_mean;
    double *total = j->sums, *m2 = total + channels;
    const double count = (double)most(1, j->count);
    if (call->inner == 1)
        for (int64_t i = 1; i < j->chunks; i++) {
            double before = (double)j->counted[i], size = (double)j->counted[i + 1] - before;
            if (size == 0) continue;
            const double *means = total + 2 * channels * i, *m2s = means + channels;
            double part = size / (before + size), weight = before * part;
            for (int64_t c = 0; c < channels; c++) {
                double delta = means[c] - total[c];
                m2[c] += m2s[c] + delta * delta * weight;
                total[c] += delta * part;
            }
        }
    for (int64_t c = 0; c < channels; c++) {
        double v = given ? moving_variance[c] : m2[c] / count;
        mean[c] = given ? moving_mean[c] : (SUM)total[c];
        low[c] = given ? 0 : (SUM)(total[c] - mean[c]);
        variance[c] = (SUM)v;
        rstd[c] = (SUM)(1 / sqrt(v + call->epsilon));
    }
    if (call->moved_mean) NAME(move)(j, total, m2);
}

/* scale = gamma rstd, offset = beta - low scale. */
static void NAME(constants)(job *j)
{
    const tn_call *call = j->call;
    const SUM *gamma = call->gamma, *beta = call->beta, *low = call->low, *rstd = call->rstd;
    SUM *scale = j->constants, *offset = scale + call->channels;
    for (int64_t c = 0; c < call->channels; c++) {
        scale[c] = (gamma ? gamma[c] : 1) * rstd[c];
        offset[c] = (SUM)((beta ? beta[c] : 0) - (double)low[c] * scale[c]);
    }
}

/* The same for a mean and variance that are given. */
static void NAME(given_constants)(job *j)
{
    const tn_call *call = j->call;
    const SUM *gamma = call->gamma, *beta = call->beta, *variance = call->variance;
    SUM *scale = j->constants, *offset = scale + call->channels;
    for (int64_t c = 0; c < call->channels; c++) {
        scale[c] = (SUM)((gamma ? gamma[c] : 1) / sqrt(variance[c] + call->epsilon));
        offset[c] = beta ? beta[c] : 0;
    }
}

/* The gradients of gamma and beta, and with them the constants of dx; see _jax.py. */
static void NAME(finish_products)(job *j)
{
    const tn_call *call = j->call;
    const int64_t channels = call->channels;
    const SUM *low = call->low, *rstd = call->rstd;
    SUM *dgamma = call->dgamma, *dbeta = call->dbeta;
    SUM *scale = j->constants, *slope = scale + 2 * channels, *level = slope + channels;
    double *first = j->sums, *second = first + channels;
    const double count = (double)most(1, j->count);
    if (call->inner == 1)
        for (int64_t i = 1; i < j->chunks; i++)
            for (int64_t c = 0; c < 2 * channels; c++) first[c] += first[2 * channels * i + c];
    for (int64_t c = 0; c < channels; c++) {
        double normalized = (second[c] - low[c] * first[c]) * rstd[c];
        double k = normalized * rstd[c] / count;
        dbeta[c] = (SUM)first[c];
        dgamma[c] = (SUM)normalized;
        slope[c] = (SUM)(-scale[c] * k);
        level[c] = (SUM)(scale[c] * (low[c] * k - first[c] / count));
        if (count == 1 && !call->mask) scale[c] = slope[c] = level[c] = 0; /* y is beta, whatever x is */
    }
}
