/* A pass over one chunk where the channels are last: the chunk is some of the rows, with sums of
 * its own. Included once for each type of values, after passes.h.
 */

/* The first shift, from the rows of a tile or, where a sample is few rows, from one of each. */
static void NAME(shift_rows)(const job *j, const VALUE *x, const uint8_t *mask, int64_t row,
                             int64_t end, SUM *shift, SUM *sums)
{
    const int64_t few = 8, width = j->width, run = most(1, j->call->run);
    const int apart = j->groups > 1 && run < few;
    const int64_t rows = apart ? (end - row + run - 1) / run : together(j, row, end - row);
    const int64_t step = apart ? j->groups * run * width : width;
    NAME(first_shift)(x, mask, rows, few, width, step, shift, sums);
}

/* Sums over the rows of one block that count; how many they are. The first block that has any makes
 * the shift. */
static int64_t NAME(sum_block)(job *j, pass_kind pass, int64_t group, int64_t row, int64_t end,
                               int first, const COLUMNS *k, SUM *shift)
{
    const tn_call *call = j->call;
    const uint8_t *mask = pass == MOMENTS ? call->mask : NULL;
    int64_t size = 0;
    for (int64_t rows; row < end; row += rows) {
        rows = together(j, row, run_length(mask, row, end));
        if (mask && !mask[row]) continue;
        const int64_t at = place(j, group, row);
        if (pass == MOMENTS && first && size == 0)
            NAME(shift_rows)(j, (const VALUE *)call->x + at, mask ? mask + row : NULL, row, end,
                             shift, k->first);
        NAME(tile)(j, pass, at, rows, j->width, step_of(j), k);
        size += rows;
    }
    return size;
}

static void NAME(sum_rows)(job *j, pass_kind pass, int64_t group, int64_t chunk, SUM *scratch)
{
    const int64_t width = j->width, channels = j->call->channels;
    const int64_t start = share(j->rows, chunk, j->chunks);
    const int64_t end = share(j->rows, chunk + 1, j->chunks);
    SUM *sums = scratch, *shift = sums + 2 * width;
    double *first = j->sums + 2 * channels * chunk + group * width, *second = first + channels;
    COLUMNS k = OF_SUM(columns_from)(j, group * width);
    k.first = sums, k.second = sums + width;
    if (pass == MOMENTS) k.mean = shift;
    for (int64_t c = 0; c < width; c++) first[c] = second[c] = 0;
    for (int64_t row = start, seen = 0; row < end; row += BLOCK) {
        for (int64_t c = 0; c < 2 * width; c++) sums[c] = 0;
        const int64_t last = least(row + BLOCK, end);
        const int64_t size = NAME(sum_block)(j, pass, group, row, last, seen == 0, &k, shift);
        if (size == 0) continue;
        if (pass == PRODUCTS) OF_SUM(join_products)(width, &k, first, second);
        else OF_SUM(join_moments)(width, (double)seen, (double)size, &k, shift, first, second);
        seen += size;
    }
}

static void NAME(write_rows)(job *j, pass_kind pass, int64_t group, int64_t chunk)
{
    int64_t row = share(j->rows, chunk, j->chunks);
    const int64_t end = share(j->rows, chunk + 1, j->chunks);
    const uint8_t *mask = pass == GRADIENT ? j->call->mask : NULL;
    const COLUMNS counted = OF_SUM(columns_from)(j, group * j->width);
    COLUMNS apart = counted; /* rows that do not count do not move the statistics: */
    apart.slope = apart.level = (const SUM *)j->constants + 4 * j->call->channels; /* zeros */
    for (int64_t rows; row < end; row += rows) {
        rows = together(j, row, run_length(mask, row, end));
        NAME(tile)(j, pass, place(j, group, row), rows, j->width, step_of(j),
                   mask && !mask[row] ? &apart : &counted);
    }
}

static void NAME(rows)(job *j, pass_kind pass, int64_t chunk, void *scratch)
{
    const int64_t group = chunk / j->chunks, part = chunk % j->chunks;
    if (pass == NORMALIZE || pass == GRADIENT) NAME(write_rows)(j, pass, group, part);
    else NAME(sum_rows)(j, pass, group, part, scratch);
}
