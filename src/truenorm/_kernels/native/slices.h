/* A pass over one chunk where the channels are first: the chunk is some of the channels, in all
 * samples. Included once for each type of values, after passes.h.
 */

/* Deals the constants of a channel to LANES columns with sums of zero; `own` is their memory. */
static COLUMNS NAME(deal)(const job *j, pass_kind pass, int64_t channel, const SUM *shift, SUM *own)
{
    const COLUMNS one = OF_SUM(columns_from)(j, channel);
    const SUM mean = pass == MOMENTS ? *shift : *one.mean;
    for (int l = 0; l < LANES; l++) {
        own[l] = mean, own[LANES + l] = *one.scale, own[2 * LANES + l] = *one.offset;
        own[3 * LANES + l] = own[4 * LANES + l] = 0;
    }
    return (COLUMNS){.mean = own,
                     .scale = own + LANES,
                     .offset = own + 2 * LANES,
                     .first = own + 3 * LANES,
                     .second = own + 4 * LANES};
}

/* Adds up the columns of one channel and joins them to what was summed of it before. */
static void NAME(gather)(job *j, pass_kind pass, const brick *b, int64_t channel, const COLUMNS *k,
                         SUM *shift)
{
    double first = 0, second = 0, *sums = j->sums + channel;
    const int64_t before = b->sample * j->call->inner + b->at;
    for (int l = 0; l < LANES; l++) first += k->first[l], second += k->second[l];
    k->first[0] = (SUM)first, k->second[0] = (SUM)second;
    if (pass == PRODUCTS) OF_SUM(join_products)(1, k, sums, sums + j->call->channels);
    else
        OF_SUM(join_moments)(1, (double)before, (double)(b->samples * b->size), k, shift, sums,
                             sums + j->call->channels);
}

static void NAME(sum_brick)(job *j, pass_kind pass, const brick *b, SUM *shifts, SUM *lanes)
{
    const int64_t channels = j->call->channels, inner = j->call->inner, rest = b->size % LANES;
    COLUMNS of[GROUP];
    for (int64_t i = 0; i < b->channels; i++)
        of[i] = NAME(deal)(j, pass, b->channel + i, shifts + b->channel + i,
                           lanes + i * LANE_ARRAYS * LANES);
    for (int64_t n = b->sample; n < b->sample + b->samples; n++)
        for (int64_t i = 0; i < b->channels; i++) {
            const int64_t at = (n * channels + b->channel + i) * inner + b->at;
            NAME(tile)(j, pass, at, b->size / LANES, LANES, LANES, &of[i]);
            if (rest) NAME(tile)(j, pass, at + b->size - rest, 1, rest, rest, &of[i]);
        }
    for (int64_t i = 0; i < b->channels; i++)
        NAME(gather)(j, pass, b, b->channel + i, &of[i], shifts + b->channel + i);
}

/* Reads GROUP channels side by side, so that memory is read in its order. Where a sample has few
 * values, several samples make one brick: at first one, then twice as many each time, since the
 * first shift is a guess from few values. */
static void NAME(sum_slices)(job *j, pass_kind pass, int64_t start, int64_t end, SUM *scratch)
{
    const tn_call *call = j->call;
    const int64_t channels = call->channels, inner = call->inner, outer = call->outer;
    const int64_t piece = least(inner, BLOCK * LANES);
    const int64_t most_samples = most(1, SEVERAL / most(1, inner));
    SUM *shifts = scratch, *lanes = shifts + channels;
    for (int64_t c = start; c < end; c++) {
        j->sums[c] = j->sums[channels + c] = 0;
        if (pass == MOMENTS && outer * inner > 0)
            NAME(first_shift)((const VALUE *)call->x + c * inner, NULL, inner, LANES, 1, 1,
                              shifts + c, lanes);
    }
    for (int64_t group = start; group < end; group += GROUP)
        for (int64_t n = 0, some = 1; n < outer; n += some, some = least(2 * some, most_samples))
            for (int64_t at = 0; at < inner; at += piece) {
                const brick b = {.channel = group,
                                 .channels = least(GROUP, end - group),
                                 .sample = n,
                                 .samples = least(some, outer - n),
                                 .at = at,
                                 .size = least(piece, inner - at)};
                NAME(sum_brick)(j, pass, &b, shifts, lanes);
            }
}

static void NAME(write_slices)(job *j, pass_kind pass, int64_t start, int64_t end)
{
    const int64_t channels = j->call->channels, inner = j->call->inner;
    for (int64_t n = 0; n < j->call->outer; n++)
        for (int64_t c = start; c < end; c++) {
            const COLUMNS one = OF_SUM(columns_from)(j, c);
            NAME(tile)(j, pass, (n * channels + c) * inner, 1, inner, inner, &one);
        }
}

static void NAME(slices)(job *j, pass_kind pass, int64_t chunk, void *scratch)
{
    const int64_t start = share(j->call->channels, chunk, j->chunks);
    const int64_t end = share(j->call->channels, chunk + 1, j->chunks);
    if (pass == NORMALIZE || pass == GRADIENT) NAME(write_slices)(j, pass, start, end);
    else NAME(sum_slices)(j, pass, start, end, scratch);
}
