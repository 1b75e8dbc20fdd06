/* A pass over one chunk where the channels are last: the chunk is some of the rows, with sums of
 * its own. Included once for each type of values, after passes.h.
 */

/* Sums over the rows of one block that count; how many they are. The first block that has any makes
 * the shift. */
static int64_t NAME(sum_block)(job *j, pass_kind pass, int64_t row, int64_t end, int first,
                               const COLUMNS *k, SUM *shift)
{
    const tn_call *call = j->call;
    const int64_t width = call->channels;
    const uint8_t *mask = pass == MOMENTS ? call->mask : NULL;
    int64_t size = 0;
    for (int64_t rows; row < end; row += rows) {
        rows = run_length(mask, row, end);
        if (mask && !mask[row]) continue;
        if (pass == MOMENTS && first && size == 0)
            NAME(first_shift)((const VALUE *)call->x + row * width, mask ? mask + row : NULL,
                              end - row, 8, width, shift, k->first);
        NAME(tile)(j, pass, row * width, rows, width, k);
        size += rows;
    }
    return size;
}

static void NAME(sum_rows)(job *j, pass_kind pass, int64_t chunk, int64_t start, int64_t end,
                           SUM *scratch)
{
    const int64_t width = j->call->channels;
    SUM *sums = scratch, *shift = sums + 2 * width;
    double *first = j->sums + 2 * width * chunk, *second = first + width;
    COLUMNS k = OF_SUM(columns_from)(j, 0);
    k.first = sums, k.second = sums + width;
    if (pass == MOMENTS) k.mean = shift;
    for (int64_t c = 0; c < 2 * width; c++) first[c] = 0;
    for (int64_t row = start, seen = 0; row < end; row += BLOCK) {
        for (int64_t c = 0; c < 2 * width; c++) sums[c] = 0;
        const int64_t last = least(row + BLOCK, end);
        const int64_t size = NAME(sum_block)(j, pass, row, last, seen == 0, &k, shift);
        if (size == 0) continue;
        if (pass == PRODUCTS) OF_SUM(join_products)(width, &k, first, second);
        else OF_SUM(join_moments)(width, (double)seen, (double)size, &k, shift, first, second);
        seen += size;
    }
}

static void NAME(write_rows)(job *j, pass_kind pass, int64_t row, int64_t end)
{
    const int64_t width = j->call->channels;
    const uint8_t *mask = pass == GRADIENT ? j->call->mask : NULL;
    const COLUMNS counted = OF_SUM(columns_from)(j, 0);
    COLUMNS apart = counted; /* rows that do not count do not move the statistics: */
    apart.slope = apart.level = (const SUM *)j->constants + 4 * width; /* zeros */
    for (int64_t rows; row < end; row += rows) {
        rows = run_length(mask, row, end);
        NAME(tile)(j, pass, row * width, rows, width, mask && !mask[row] ? &apart : &counted);
    }
}

static void NAME(rows)(job *j, pass_kind pass, int64_t chunk, void *scratch)
{
    const int64_t start = share(j->call->outer, chunk, j->chunks);
    const int64_t end = share(j->call->outer, chunk + 1, j->chunks);
    if (pass == NORMALIZE || pass == GRADIENT) NAME(write_rows)(j, pass, start, end);
    else NAME(sum_rows)(j, pass, chunk, start, end, scratch);
}
