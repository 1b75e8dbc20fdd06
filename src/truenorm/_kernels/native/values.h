/* All code for one type of values. Whoever includes it says what the type is:
 *
 *   VALUE, SUM        the type of the values, and that of sums and of numbers per channel
 *   NAME(f)           the name of the function f for VALUE
 *   OF_SUM(f)         the name of the function f for SUM, of statistics.h
 *   LOAD(v), STORE(s) from VALUE to SUM, and back
 */
#include "passes.h"

#include "rows.h"
#include "slices.h"

#undef VALUE
#undef NAME
#undef LOAD
#undef STORE
