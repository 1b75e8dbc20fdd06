/* What is computed once per channel, between the passes. Included once for each type of sums, SUM;
 * OF_SUM(f) is the name of f for it.
 */

/* The constants of each column of a tile (see passes.h), and where its sums are added up. */
typedef struct {
    const SUM *mean, *scale, *offset, *slope, *level;
    SUM *first, *second;
} OF_SUM(columns);
#define COLUMNS OF_SUM(columns)

/* The constants of this channel and those after it, without sums. */
static COLUMNS OF_SUM(columns_from)(const job *j, int64_t channel)
{
    const int64_t channels = j->call->channels;
    const SUM *scale = (const SUM *)j->constants + channel;
    return (COLUMNS){.mean = (const SUM *)j->call->mean + channel,
                     .scale = scale,
                     .offset = scale + channels,
                     .slope = scale + 2 * channels,
                     .level = scale + 3 * channels};
}

/* Joins a block's sums of products to those of the blocks before it, in double. */
static void OF_SUM(join_products)(int64_t width, const COLUMNS *k, double *restrict first,
                                  double *restrict second)
{
    for (int64_t c = 0; c < width; c++) first[c] += k->first[c], second[c] += k->second[c];
}

/* Joins a block's moments, of `size` values, to those of the `before` values before it, in double.
 *
 * Moments are kept as count, mean and M2, the sum of squared deviations from the mean (Chan, Golub
 * and LeVeque, 1983). The block's sums are of x - shift; the next block's shift is the mean so far.
 * The further the shift is from the block's own mean, the more digits its M2 loses to cancellation;
 * but the same distance is added to M2, squared, so what is lost is small beside what is added.
 * Where nothing came before, that is 0 even if the square alone is no number of this type. */
static void OF_SUM(join_moments)(int64_t width, double before, double size, const COLUMNS *k,
                                 SUM *restrict shift, double *restrict mean, double *restrict m2)
{
    const double part = size / (before + size), weight = before * part, inverse = 1 / size;
    for (int64_t c = 0; c < width; c++) {
        double step = k->first[c] * inverse, inside = k->second[c] - k->first[c] * step;
        double delta = (shift[c] - mean[c]) + step;
        m2[c] += (inside < 0 ? 0 : inside) + delta * weight * delta;
        mean[c] += delta * part;
        shift[c] = (SUM)mean[c];
    }
}

/* One step of the moving statistics toward the batch's. */
static void OF_SUM(move)(const job *j, int64_t channel, int64_t end, const double *means,
                         const double *m2)
{
    const tn_call *call = j->call;
    const SUM *mean = call->mean, *variance = call->variance;
    const SUM *old_mean = call->moving_mean, *old_variance = call->moving_variance;
    SUM *new_mean = call->moved_mean, *new_variance = call->moved_variance;
    const double m = call->momentum, count = (double)j->count;
    for (int64_t c = channel; c < end; c++) {
        const int finite = isfinite(mean[c]) && isfinite(variance[c]);
        const double next = m2[c] / (call->unbiased ? count - 1 : count);
        new_mean[c] =
            finite && count > 0 ? (SUM)(m * old_mean[c] + (1 - m) * means[c]) : old_mean[c];
        new_variance[c] =
            finite && count > 1 ? (SUM)(m * old_variance[c] + (1 - m) * next) : old_variance[c];
    }
}

/* The constants of the output: scale = gamma rstd, offset = beta - low scale. */
static void OF_SUM(constants_of)(job *j, int64_t channel, int64_t end)
{
    const tn_call *call = j->call;
    const SUM *gamma = call->gamma, *beta = call->beta, *low = call->low, *rstd = call->rstd;
    SUM *scale = j->constants, *offset = scale + call->channels;
    for (int64_t c = channel; c < end; c++) {
        scale[c] = (gamma ? gamma[c] : 1) * rstd[c];
        offset[c] = (SUM)((beta ? beta[c] : 0) - (double)low[c] * scale[c]);
    }
}

static void OF_SUM(constants)(job *j) { OF_SUM(constants_of)(j, 0, j->call->channels); }

/* From the moments of all chunks to the statistics of the batch, and the constants of its output. */
static void OF_SUM(finish_moments)(job *j, int64_t channel, int64_t end)
{
    const tn_call *call = j->call;
    SUM *mean = call->mean, *variance = call->variance, *low = call->low, *rstd = call->rstd;
    const SUM *moving_mean = call->moving_mean, *moving_variance = call->moving_variance;
    const int given = j->count == 0 && moving_mean; /* the moving statistics normalise */
    const double *means = j->sums, *m2 = means + call->channels, count = (double)most(1, j->count);
    if (call->inner == 1) merge_moments(j);
    for (int64_t c = channel; c < end; c++) {
        const double v = given ? moving_variance[c] : m2[c] / count;
        mean[c] = given ? moving_mean[c] : (SUM)means[c];
        low[c] = given ? 0 : (SUM)(means[c] - mean[c]);
        variance[c] = (SUM)v;
        if (rstd) rstd[c] = (SUM)(1 / sqrt(v + call->epsilon));
    }
    if (call->moved_mean) OF_SUM(move)(j, channel, end, means, m2);
    if (call->y) OF_SUM(constants_of)(j, channel, end);
}

/* The same from a mean and variance that are given. */
static void OF_SUM(constants_given)(job *j)
{
    const tn_call *call = j->call;
    const SUM *gamma = call->gamma, *beta = call->beta, *variance = call->variance;
    SUM *scale = j->constants, *offset = scale + call->channels;
    for (int64_t c = 0; c < call->channels; c++) {
        scale[c] = (SUM)((gamma ? gamma[c] : 1) / sqrt(variance[c] + call->epsilon));
        offset[c] = beta ? beta[c] : 0;
    }
}

/* The constants of dx = h scale + (x - mean) slope + level in one channel, from the means of h x^
 * and of h: see finish_products. */
static inline void OF_SUM(line)(job *j, int64_t c, double of_products, double of_gradient)
{
    const tn_call *call = j->call;
    const SUM *low = call->low, *rstd = call->rstd;
    SUM *scale = j->constants, *slope = scale + 2 * call->channels, *level = slope + call->channels;
    const double k = of_products * rstd[c];
    slope[c] = (SUM)(-scale[c] * k);
    level[c] = (SUM)(scale[c] * (low[c] * k - of_gradient));
}

/* All constants of dx from means that are given. */
static void OF_SUM(gradient_given)(job *j)
{
    const SUM *of_products = j->call->dgamma, *of_gradient = j->call->dbeta;
    OF_SUM(constants)(j);
    for (int64_t c = 0; c < j->call->channels; c++)
        OF_SUM(line)(j, c, of_products[c], of_gradient[c]);
}

/* The gradients of gamma and beta, and from them the constants of dx: with the h of passes.h, the
 * normalised input x^ = (x - mean - low) rstd, and the count n,
 *
 *   dbeta = sum h,  dgamma = sum h x^,  dx = gamma rstd (h - dbeta / n - x^ dgamma / n)
 *
 * and the latter is h scale + (x - mean) slope + level. */
static void OF_SUM(finish_products)(job *j, int64_t channel, int64_t end)
{
    const tn_call *call = j->call;
    const int64_t channels = call->channels;
    const SUM *low = call->low, *rstd = call->rstd;
    SUM *dgamma = call->dgamma, *dbeta = call->dbeta;
    SUM *scale = j->constants, *slope = scale + 2 * channels, *level = slope + channels;
    const double *first = j->sums, *second = first + channels;
    const double count = (double)most(1, j->count);
    const int one = count == 1 && !call->mask; /* one value: y is beta, whatever x is */
    if (call->inner == 1) merge_products(j);
    for (int64_t c = channel; c < end; c++) {
        const double normalized = (second[c] - low[c] * first[c]) * rstd[c];
        dbeta[c] = (SUM)first[c];
        dgamma[c] = (SUM)normalized;
        if (!has_constants(call)) continue;
        OF_SUM(line)(j, c, normalized / count, first[c] / count);
        if (one) scale[c] = slope[c] = level[c] = 0;
    }
}
