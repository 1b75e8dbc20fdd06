/* Numbers of 16 bits, to float and back: rounded to nearest, ties to even. */
#ifndef TRUENORM_SIXTEEN_H
#define TRUENORM_SIXTEEN_H

#include <stdint.h>
#include <string.h>

#include "job.h"

static ALWAYS_INLINE float float_of(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static ALWAYS_INLINE uint32_t bits_of(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* bfloat16 is the upper half of a float. */
static ALWAYS_INLINE float from_bfloat16(uint16_t v) { return float_of((uint32_t)v << 16); }

static ALWAYS_INLINE uint16_t to_bfloat16(float value)
{
    const uint32_t bits = bits_of(value), rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (uint16_t)(value != value ? 0x7fc0 : rounded);
}

/* float16: by the processor's own instructions where the compiler makes vectors of them. */
#if defined __FLT16_MAX__ && (defined __aarch64__ || (defined __F16C__ && defined __clang__))
static ALWAYS_INLINE float from_float16(uint16_t v)
{
    _Float16 value;
    memcpy(&value, &v, sizeof value);
    return value;
}

static ALWAYS_INLINE uint16_t to_float16(float value)
{
    const _Float16 rounded = (_Float16)value;
    uint16_t bits;
    memcpy(&bits, &rounded, sizeof bits);
    return bits;
}
#else
/* Elsewhere in arithmetic of which any compiler makes vectors. GCC converts a _Float16 for x86-64
 * value by value, and calls a function for each if it may not use F16C.
 *
 * The 10 bits of the fraction are moved to where a float has its 23, and the exponent is raised by
 * 112, the difference of the biases; that of infinity and NaN by as much again. With the smallest
 * exponent the fraction counts units of 2^-24: so do a float's last bits on top of 0.5, and bits 13
 * and up on top of 2^-14. No operand is a subnormal float, so it does not matter whether a program
 * has these flushed to zero. */
enum { FRACTION = 13, REBIAS = 112 << 23, LEAST_NORMAL = 113 << 23, INFINITE = 255 << 23 };

static ALWAYS_INLINE float from_float16(uint16_t v)
{
    const uint32_t sign = (uint32_t)(v & 0x8000) << 16;
    const int32_t size = (v & 0x7fff) << FRACTION;
    const int32_t small = -(size < 1 << 23), large = -(size >= 31 << 23); /* all bits or none */
    const int32_t moved = size + REBIAS + (small & 1 << 23) + (large & REBIAS);
    const float value = float_of((uint32_t)moved) - float_of((uint32_t)(small & LEAST_NORMAL));
    return float_of(sign | bits_of(value));
}

static ALWAYS_INLINE uint16_t to_float16(float value)
{
    const uint32_t sign = bits_of(value) >> 16 & 0x8000;
    const int32_t size = (int32_t)(bits_of(value) & 0x7fffffff);
    const int32_t normal = (size - REBIAS + 0xfff + (size >> FRACTION & 1)) >> FRACTION;
    const int32_t units = (int32_t)(bits_of(float_of((uint32_t)size) + 0.5f) - bits_of(0.5f));
    const int32_t small = -(size < LEAST_NORMAL), large = -(size >= 0x477ff000); /* 65520 */
    const int32_t endless = 0x7c00 | (-(size > INFINITE) & 0x200);               /* or NaN */
    const int32_t finite = (small & units) | (~small & normal);
    return (uint16_t)(sign | (uint32_t)((large & endless) | (~large & finite)));
}
#endif

#endif
