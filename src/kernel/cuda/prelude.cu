// What every kernel is printed after: numbers, memory and noise, by the same operations as on the CPU, in the same order.
// There are no headers for it to include. `real` is what a kernel computes in; NOISE, BFLOAT16, FLOAT16 and TANH are
// defined in front of this where they are needed.

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#ifdef DOUBLE
typedef double real;
__device__ inline real of_bits(u64 bits) { return __longlong_as_double((long long)bits); }
__device__ inline real root(real x) { return sqrt(x); }
__device__ inline real magnitude(real x) { return fabs(x); }
#ifdef TANH
__device__ inline real hyperbolic(real x) { return tanh(x); }
#endif
#else
typedef float real;
__device__ inline real of_bits(u64 bits) { return __uint_as_float((u32)bits); }
__device__ inline real root(real x) { return sqrtf(x); }
__device__ inline real magnitude(real x) { return fabsf(x); }
#ifdef TANH
__device__ inline real hyperbolic(real x) { return tanhf(x); }
#endif
#endif

// A NaN in `a` stays; fmin and fmax would drop it.
__device__ inline real smaller(real a, real b) { return b < a ? b : a; }
__device__ inline real larger(real a, real b) { return b > a ? b : a; }

__device__ inline real read(float x) { return (real)x; }
__device__ inline real read(double x) { return (real)x; }
__device__ inline void write(float& to, real x) { to = (float)x; }
__device__ inline void write(double& to, real x) { to = (double)x; }

#ifdef BFLOAT16
struct bfloat16 {
    u16 bits;
};
__device__ inline real read(bfloat16 x) { return (real)__uint_as_float((u32)x.bits << 16); }
__device__ inline void write(bfloat16& to, real wide) {
    const float x = (float)wide;
    const u32 bits = __float_as_uint(x);
    const u32 rounded = (bits + (0x7FFFu + (bits >> 16 & 1u))) >> 16;
    to.bits = x != x ? (u16)0x7FC0 : (u16)rounded;
}
#endif

#ifdef FLOAT16
struct float16 {
    u16 bits;
};
__device__ inline real read(float16 x) {
    const u32 smallest = 113u << 23;
    const u32 sign = (u32)(x.bits & 0x8000) << 16;
    const u32 magnitude = (u32)(x.bits & 0x7FFF) << 13;
    const u32 usual = magnitude + (112u << 23);
    const u32 endless = magnitude + (224u << 23);
    const u32 small = __float_as_uint(__uint_as_float(magnitude + smallest) - __uint_as_float(smallest));
    const u32 bits = magnitude >= 31u << 23 ? endless : magnitude < 1u << 23 ? small : usual;
    return (real)__uint_as_float(sign | bits);
}
__device__ inline void write(float16& to, real wide) {
    const u32 half = 0x3F000000u;
    const u32 bits = __float_as_uint((float)wide);
    const u32 sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
    const u32 usual = ((magnitude + (0xFFFu + (magnitude >> 13 & 1u))) >> 13) - (112u << 10);
    const u32 small = __float_as_uint(__uint_as_float(magnitude) + __uint_as_float(half)) - half;
    const u32 finite = magnitude < 113u << 23 ? small : usual;
    const u32 endless = magnitude > 255u << 23 ? 0x7E00u : 0x7C00u;
    to.bits = (u16)(sign | (magnitude >= 0x477FF000u ? endless : finite));
}
#endif

#ifdef NOISE
// Philox4x32-10 at counter `l` of a group: the words of positions l, l+16, l+32 and l+48 of its 64.
__device__ inline void philox(u64 seed, u64 step, u64 sample, u64 group, u32 l, u32 (&words)[4]) {
    const u64 first = group * 16;
    u32 a = (u32)first + l, b = ((u32)(first >> 32) & 0xFFFFu) | (u32)(step >> 32) << 16;
    u32 c = (u32)step, d = (u32)sample;
    u32 key0 = (u32)seed, key1 = (u32)(seed >> 32);
#pragma unroll
    for (int round = 0; round < 10; round++) {
        const u64 p = 0xD2511F53ull * a, q = 0xCD9E8D57ull * c;
        a = (u32)(q >> 32) ^ b ^ key0;
        c = (u32)(p >> 32) ^ d ^ key1;
        b = (u32)q;
        d = (u32)p;
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    words[0] = a;
    words[1] = b;
    words[2] = c;
    words[3] = d;
}

#ifdef DOUBLE
__device__ inline real minus_two_ln(u32 x) {
    const u64 away = 64ull << 52, digits = 0x4330000000000000ull;
    const u64 bits = (u64)__double_as_longlong((double)x + 0.5);
    const u64 k = (bits + away - 0x3FE6A09E667F3BCDull) >> 52;
    const double m = of_bits(bits + away - (k << 52));
    const double halvings = of_bits(digits + 32 + 64) - of_bits(digits + k);
    const double s = (m - 1.0) / (m + 1.0);
    const double t = s * s;
    const double tail = t * (-4.0 * 0.09091444562630861 +
                             t * (-4.0 * 0.07665860800278021 + t * (-4.0 * 0.07308224842521703)));
    const double series = t * (-4.0 * 0.3333333333333335 +
                               t * (-4.0 * 0.19999999999949752 +
                                    t * (-4.0 * 0.14285714312987743 + t * (-4.0 * 0.1111110556739754 + tail))));
    return s * (-4.0 + series) + halvings * (2.0 * 0.6931471805599453);
}

__device__ inline void sin_cos_turn(u32 x, real& sin, real& cos) {
    const u32 quarter = x + (1u << 29);
    const double r = ((double)(int)(x - (quarter & (3u << 30))) + 0.5) * (6.283185307179586 * (1.0 / 4294967296.0));
    const double t = r * r;
    const double sin_tail =
        t * (2.7557316102551507e-6 + t * (-2.5051131844808866e-8 + t * 1.5918129280835e-10));
    const double s =
        r + r * (t * (-0.16666666666666666 +
                      t * (0.008333333333330948 + t * (-1.9841269836758574e-4 + sin_tail))));
    const double cos_tail =
        t * (-2.755731727172921e-7 + t * (2.087614626828136e-9 + t * -1.1382632416743667e-11));
    const double c =
        1.0 + t * (-0.5 + t * (0.041666666666666664 +
                               t * (-0.0013888888888887398 + t * (2.4801587298765686e-5 + cos_tail))));
    const bool odd = (quarter & (1u << 30)) != 0;
    const u64 a = (u64)__double_as_longlong(odd ? c : s), b = (u64)__double_as_longlong(odd ? s : c);
    sin = of_bits(a ^ (u64)(quarter >> 31) << 63);
    cos = of_bits(b ^ (u64)((quarter + (1u << 30)) >> 31) << 63);
}
#else
__device__ inline real minus_two_ln(u32 x) {
    const u32 bits = __float_as_uint((float)x + 0.5f);
    const int k = (int)(bits - 0x3F3504F3u) >> 23;
    const float m = __uint_as_float(bits - ((u32)k << 23));
    const float d = k == 32 ? ((float)~x + 0.5f) * -(1.0f / 4294967296.0f) : m - 1.0f;
    const float s = d / (m + 1.0f);
    const float t = s * s;
    const float series =
        -4.0f + t * (-4.0f * 0.3333339f + t * (-4.0f * 0.19988771f + t * (-4.0f * 0.14935864f)));
    return s * series + (float)(32 - k) * (2.0f * 0.69314718f);
}

__device__ inline void sin_cos_turn(u32 x, real& sin, real& cos) {
    const u32 quarter = x + (1u << 29), sign = 1u << 31;
    const float r = (float)(int)(x - (quarter & (3u << 30))) * (float)(6.283185307179586 * (1.0 / 4294967296.0));
    const float t = r * r;
    const float s = r + r * (t * (-0.16666655f + t * (0.00833218f + t * -0.00019517f)));
    const float c =
        1.0f + t * (-0.5f + t * (0.041666647f + t * (-0.0013887368f + t * 0.00002443845f)));
    const bool odd = (quarter & (1u << 30)) != 0;
    sin = __uint_as_float(__float_as_uint(odd ? c : s) ^ (quarter & sign));
    cos = __uint_as_float(__float_as_uint(odd ? s : c) ^ ((quarter + (1u << 30)) & sign));
}
#endif

// Box and Muller's transform of two words.
__device__ inline void box_muller(u32 x, u32 y, real& z, real& other) {
    const real r = root(minus_two_ln(x));
    real sin, cos;
    sin_cos_turn(y, sin, cos);
    z = r * cos;
    other = r * sin;
}

// The normals of positions l, l+16, l+32 and l+48 of a group.
__device__ inline void normals(u64 seed, u64 step, u64 sample, u64 group, u32 l, real (&z)[4]) {
    u32 words[4];
    philox(seed, step, sample, group, l, words);
    box_muller(words[0], words[1], z[0], z[1]);
    box_muller(words[2], words[3], z[2], z[3]);
}
#endif
