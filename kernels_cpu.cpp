// Linears of few rows for the CPU: weights in bf16, int8 or int4 stream once from memory, activations stay exact.
//
// Built and called by kernels_cpu.py. Decoding reads every weight once a token, so the aim is the memory's read
// bandwidth: about 11 cycles a core for each 64-byte line of weights, into which unpacking and multiplying must fit.
//
// With AVX-512's bf16 products one idea carries all formats. A bf16 holds every int8 and every int4 exactly, and a
// float32 is exactly the sum of three bf16 (8 + 8 + 8 bits of significand). So every weight becomes bf16 in registers,
// a float32 activation becomes three bf16 rows, and one instruction does the rest: dot(), 32 products summed in float32.
// Elsewhere (AVX2, NEON, ...) weights become float32 in registers, and meet float32 activations that were brought into
// the order in which a format's weights come out. Either way nothing is rounded but the float32 sums. Vectors are
// GCC/Clang vector extensions, of 64 bytes or the machine's own width, with intrinsics where they save instructions.
//
// The headers are PyTorch's stable ABI ones: they compile in 2 s where torch/library.h takes 10.
// Sources: Intel's intrinsics guide (vdpbf16ps, vpermw); the fp16 decoding by a multiplication is F. Giesen's.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <optional>
#include <vector>
#ifdef __AVX2__
#include <immintrin.h>
#endif
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define HAVE_AVX512 1
#endif

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Floats = float __attribute__((vector_size(64)));   // 16 float32
using Words = uint32_t __attribute__((vector_size(64)));  // 32 bf16: word i holds columns 2i (low half) and 2i + 1
using Ints = int32_t __attribute__((vector_size(64)));
#define INLINE inline __attribute__((always_inline))

// ------------------------------------------------------------------------------------------------------ primitives
template <class V>
INLINE V load(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);  // one unaligned load
  return v;
}

template <class F = Floats, class I = Ints, class U>
INLINE F high_fp16(U w) {  // the fp16 in the upper half of each word; float32 and fp16 differ by 2^112
  return (F)((I)w >> 3 & (int32_t)0x8fffe000) * 0x1p112f;
}

INLINE float from_bits(uint32_t b) { float f; std::memcpy(&f, &b, 4); return f; }
INLINE uint32_t bits(float f) { uint32_t b; std::memcpy(&b, &f, 4); return b; }
INLINE uint16_t round_bf16(float f) {  // to nearest even; a NaN stays one
  uint32_t b = bits(f);
  return f != f ? 0x7fc0 : (b + 0x7fff + (b >> 16 & 1)) >> 16;
}

// --------------------------------------------------------------------------------------------------------- kernels
// Activations: x's rows in the order that a format wants, padded with zeros, `parts` for each of the caller's. So many as
// `together` meet the weights at once; their lines of 64 bytes alternate, because rows 4096 bytes apart would all want
// the same few places of the L1 cache. For int4 also `sums`: of each block, minus the sums of its 16 stretches of 16
// columns, with which the sum of (q - zero) * x begins.
//
// tile(): out[m * R + r] = dot product of weight row n[r] with activation row m0 + m. R rows of weights share each
// load of the activations, M rows of activations share each unpacking of the weights; the sums stay in registers.
// The processor's own prefetcher starts anew at every row and page, so each tile asks for the next one's rows.
INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }  // to L2: a tile may be larger than L1

struct Lines {  // where a row's lines lie
  int64_t parts, rows, together, lines;  // lines: of one row
  int64_t count(int64_t m0) const { return std::min(rows - m0, together); }  // rows that meet the weights with m0
  int64_t slot(int64_t m, int64_t i, int64_t n) const {  // where element i of n of row m lies
    const int64_t m0 = m / together * together;
    return m0 * n + i * count(m0) + m - m0;
  }
};

#ifdef HAVE_AVX512
INLINE Floats dot(Floats sum, Words w, Words x) {  // sum[i] += w[2i] * x[2i] + w[2i + 1] * x[2i + 1]
  return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)x);
}

INLINE Words int8_to_bf16(const uint8_t* p) {
  __m512 lo = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
  __m512 hi = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)(p + 16))));
  return (Words)_mm512_cvtne2ps_pbh(hi, lo);
}

INLINE Words int4_to_bf16(Words w, int k) {  // nibble k of each of 32 halves
  // vpermw looks 32 halves up at once and obeys 5 bits of each: the table of 16 is repeated, the 5th bit is moot.
  const __m512i table = _mm512_broadcast_i64x4(_mm256_setr_epi16(0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0,
      0x40e0, 0x4100, 0x4110, 0x4120, 0x4130, 0x4140, 0x4150, 0x4160, 0x4170));
  return (Words)_mm512_permutexvar_epi16((__m512i)(w >> (4 * k)), table);
}

INLINE Words spread(const uint32_t* p, int shift) {  // word i = p[i >> shift], reading no more than that
  const __m512i i = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  __m512i few = _mm512_maskz_loadu_epi32((1u << (16 >> shift)) - 1, p);
  return (Words)_mm512_permutexvar_epi32(_mm512_srl_epi32(i, _mm_cvtsi32_si128(shift)), few);
}

INLINE float sum(Floats v) { return _mm512_reduce_add_ps((__m512)v); }

struct alignas(64) Line { uint32_t word[16]; };  // 32 bf16 (or 16 float32)

// Rows of bf16, padded with zeros, `parts` for each of the caller's. At most 8 meet the weights at once (`together`);
// their lines alternate, because rows 4096 bytes apart would all want the same few places of the L1 cache.
struct Activations : Lines {
  const Line* x;
  std::vector<Line> own, sums;

  template <class W>
  Activations(const Tensor& t, int64_t K, const W&) : Activations(t, K, W::block) {}

  Activations(const Tensor& t, int64_t K, int64_t block) {  // block: columns that the weights interleave
    const bool is_float = t.scalar_type() == ScalarType::Float;
    parts = is_float ? 3 : 1, rows = t.numel() / K * parts, together = is_float ? 6 : 8;
    lines = (K + block - 1) / block * (block / 32);
    x = (const Line*)t.const_data_ptr();
    if (rows == 1 && block == 32 && K % 32 == 0) return;  // as it is
    own.resize(rows * lines);  // zeros
    x = own.data();
    for (int64_t m = 0; m < rows; m += parts)
      for (int64_t k0 = 0; k0 < K; k0 += 32) {
        const int64_t columns = std::min<int64_t>(K - k0, 32), from = m / parts * K + k0;
        if (is_float) split((const float*)t.const_data_ptr() + from, columns, &own[slot(m, k0 / 32, lines)]);
        else std::memcpy(&own[slot(m, k0 / 32, lines)], (const uint16_t*)t.const_data_ptr() + from, columns * 2);
      }
    if (block == 256) interleave();
  }

  static void split(const float* from, int64_t columns, Line* to) {  // a float32 to three bf16 that sum to it exactly
    for (int64_t k = 0; k < columns; k++) {
      float rest = from[k];
      for (int p = 0; p < 3; p++) {
        const uint32_t part = bits(rest) & 0xffff0000u;  // truncated, not rounded, so that 8 + 8 + 8 bits suffice
        to[p].word[k / 2] |= k % 2 ? part : part >> 16;
        rest -= from_bits(part);
      }
    }
  }

  void interleave() {  // word t of each stretch of 16 columns moves to line t of its block of 256
    sums.resize(own.size() / 8);
    for (int64_t m = 0; m < rows; m++)
      for (int64_t b = 0; b < lines / 8; b++) {
        Line in[8];
        Floats s = {};
        for (int t = 0; t < 8; t++) in[t] = own[slot(m, b * 8 + t, lines)];
        for (int t = 0; t < 8; t++) {
          Line& out = own[slot(m, b * 8 + t, lines)];
          for (int j = 0; j < 16; j++) out.word[j] = in[j / 2].word[j % 2 * 8 + t];
          const Words w = load<Words>(&out);
          s -= (Floats)(w << 16) + (Floats)(w & 0xffff0000u);
        }
        std::memcpy(&sums[slot(m, b, lines / 8)], &s, sizeof s);
      }
  }
};

struct Bf16 {
  static constexpr int64_t bytes = 64;  // of 32 columns
  static constexpr int R(int M) { return M == 1 ? 8 : 4; }  // R is measured
  static INLINE Words unpack(const uint8_t* p) { return load<Words>(p); }
};
struct Int8 {
  static constexpr int64_t bytes = 32;
  static constexpr int R(int M) { return M == 1 ? 8 : M <= 4 ? 4 : 3; }
  static INLINE Words unpack(const uint8_t* p) { return int8_to_bf16(p); }
};

template <class Format>
struct Plain {  // columns in order
  static constexpr int64_t block = 32;
  static constexpr int R(int M) { return Format::R(M); }
  const uint8_t* w;
  int64_t K;
  int64_t row_bytes() const { return K * Format::bytes / 32; }

  template <int R, int M>
  void tile(const int64_t* n, const Activations& a, int64_t m0, float* out) const {
    const uint8_t* from[R];
    for (int r = 0; r < R; r++) from[r] = w + n[r] * row_bytes();
    const Line* x = a.x + m0 * a.lines;
    Floats acc[R][M] = {};
    auto step = [&](const uint8_t* const* p, int64_t offset, int64_t line) __attribute__((always_inline)) {
      Words wr[R];
      for (int r = 0; r < R; r++) {
        prefetch(p[r] + offset + R * row_bytes());
        wr[r] = Format::unpack(p[r] + offset);
      }
      for (int m = 0; m < M; m++) {
        const Words xm = load<Words>(x + line * M + m);
        for (int r = 0; r < R; r++) acc[r][m] = dot(acc[r][m], wr[r], xm);
      }
    };
    const int64_t steps = K / 32, done = steps * Format::bytes;
    for (int64_t i = 0; i < steps; i++) step(from, i * Format::bytes, i);
    if (K % 32) {  // the last columns, padded with zeros
      uint8_t last[R][64] = {};
      for (int r = 0; r < R; r++) from[r] = (uint8_t*)std::memcpy(last[r], from[r] + done, row_bytes() - done);
      step(from, 0, steps);
    }
    for (int m = 0; m < M; m++)
      for (int r = 0; r < R; r++) out[m * R + r] = sum(acc[r][m]);
  }
};

// A block of 256 columns is 16 stretches of 16, one for each float32 lane of a sum: dot() t multiplies columns 2t and
// 2t + 1 of every stretch. After 8 of them lane j holds stretch j's sum, so one multiplication applies all the groups'
// scales. The 128 bytes of a block are two lines of 32 halves; nibble k of line l belongs to t = 4 l + k.
struct Int4 {
  static constexpr int64_t block = 256;
  static constexpr int R(int M) { return M == 1 ? 1 : M <= 3 ? 4 : 3; }
  const uint8_t* w;
  const uint32_t* scales;  // [N, groups]: fp16 scale in the upper half, fp16 zero in the lower
  int64_t blocks, groups;  // of one row
  int shift;               // log2 of the stretches in a group
  int64_t row_bytes() const { return blocks * 128; }

  template <int R, int M>
  void tile(const int64_t* n, const Activations& a, int64_t m0, float* out) const {
    const uint8_t* from[R];
    const uint32_t* group[R];
    for (int r = 0; r < R; r++) from[r] = w + n[r] * row_bytes(), group[r] = scales + n[r] * groups;
    const Line *x = a.x + m0 * a.lines, *sums = a.sums.data() + m0 * blocks;
    const int64_t ahead = R * row_bytes(), end = blocks;  // locals: the compiler keeps them in registers
    const int log2 = shift, step = 16 >> log2;
    Floats acc[R][M] = {};
    for (int64_t b = 0; b < end; b++, x += 8 * M, sums += M) {
      Floats part[R][M], scale[R];
      for (int r = 0; r < R; r++) {
        const Words s = spread(group[r], log2);
        scale[r] = high_fp16(s);
        for (int m = 0; m < M; m++)  // the sum of (q - zero) * x begins with -zero * sum of x
          part[r][m] = high_fp16(s << 16) * load<Floats>(sums + m);
      }
      for (int l = 0; l < 2; l++) {
        Words q[R];
        for (int r = 0; r < R; r++) {
          prefetch(from[r] + l * 64 + ahead);
          q[r] = load<Words>(from[r] + l * 64);
        }
        for (int k = 0; k < 4; k++) {
          Words wr[R];
          for (int r = 0; r < R; r++) wr[r] = int4_to_bf16(q[r], k);
          for (int m = 0; m < M; m++) {
            const Words xm = load<Words>(x + (l * 4 + k) * M + m);
            for (int r = 0; r < R; r++) part[r][m] = dot(part[r][m], wr[r], xm);
          }
        }
      }
      for (int r = 0; r < R; r++) {
        for (int m = 0; m < M; m++) acc[r][m] += part[r][m] * scale[r];
        from[r] += 128, group[r] += step;
      }
    }
    for (int m = 0; m < M; m++)
      for (int r = 0; r < R; r++) out[m * R + r] = sum(acc[r][m]);
  }
};
#else  // ----------------------------------------------------------------------------------- weights as float32
#if defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;  // SSE2, NEON
#endif
using F = float __attribute__((vector_size(4 * LANES)));
using I = int32_t __attribute__((vector_size(4 * LANES)));
using U = uint32_t __attribute__((vector_size(4 * LANES)));
struct alignas(64) Line { float at[16]; };

struct Activations : Lines {
  const Line* x;
  std::vector<Line> own, sums;

  template <class W>
  Activations(const Tensor& t, int64_t K, const W&) {
    constexpr int64_t block = W::block;
    const bool is_float = t.scalar_type() == ScalarType::Float;
    parts = 1, rows = t.numel() / K, together = 8, lines = (K + block - 1) / block * (block / 16);
    x = (const Line*)t.const_data_ptr();
    if (W::in_order && is_float && rows == 1 && K % block == 0) return;  // as it is
    own.resize(rows * lines);
    if (block == 256) sums.resize(rows * lines / 16);
    x = own.data();
    for (int64_t m = 0; m < rows; m++)
      for (int64_t k0 = 0; k0 < K; k0 += block) {
        const int64_t columns = std::min(K - k0, block), from = m * K + k0;
        float in[block] = {};
        if (is_float) std::memcpy(in, (const float*)t.const_data_ptr() + from, columns * 4);
        else
          for (int64_t k = 0; k < columns; k++) in[k] = from_bits(((const uint16_t*)t.const_data_ptr())[from + k] << 16);
        for (int64_t i = 0; i < block / 16; i++) {
          float* to = own[slot(m, k0 / 16 + i, lines)].at;
          for (int64_t j = 0; j < 16; j++) to[j] = in[W::column(16 * i + j)] * W::factor(16 * i + j);
        }
        if (block == 256) {
          float* to = sums[slot(m, k0 / 256, lines / 16)].at;
          for (int64_t k = 0; k < 256; k++) to[k / 16] -= in[k];
        }
      }
  }
};

INLINE float sum(F v) {
  float s = 0;
  for (int i = 0; i < LANES; i++) s += v[i];
  return s;
}

struct Bf16 {
  static constexpr int64_t bytes = 64;  // of 32 columns
  static constexpr int alone = 8;       // rows of weights that meet one of x at once: measured
  static constexpr bool in_order = false;
  static constexpr int64_t column(int64_t i) {  // of each 2 LANES columns first the even ones
    const int64_t v = i / LANES;
    return v / 2 * 2 * LANES + i % LANES * 2 + v % 2;
  }
  static INLINE F unpack(const uint8_t* p, int v) {  // vector v of the columns; a bf16 is the upper half of a float32
    const U w = load<U>(p + v / 2 * sizeof(U));
    return (F)(v % 2 ? w & 0xffff0000u : w << 16);
  }
};
struct Int8 {
  static constexpr int64_t bytes = 32;
  static constexpr int alone = 4;
  static constexpr bool in_order = true;
  static constexpr int64_t column(int64_t i) { return i; }
  static INLINE F unpack(const uint8_t* p, int v) {
#ifdef __AVX2__
    return (F)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(p + v * LANES))));
#else
    const uint32_t four = load<uint32_t>(p + v * LANES);
    const U bytes = {four << 24, four << 16, four << 8, four};
    return __builtin_convertvector((I)bytes >> 24, F);
#endif
  }
};

template <class Format>
struct Plain {  // 32 columns at a time
  static constexpr int64_t block = 32;
  static constexpr bool in_order = Format::in_order;
  static constexpr int R(int M) { return M == 1 ? Format::alone : M == 2 ? 4 : M == 3 ? 3 : 2; }  // 16 registers
  static constexpr int64_t column(int64_t i) { return Format::column(i); }
  static constexpr float factor(int64_t) { return 1; }
  const uint8_t* w;
  int64_t K;
  int64_t row_bytes() const { return K * Format::bytes / 32; }

  template <int R, int M>
  void tile(const int64_t* n, const Activations& a, int64_t m0, float* out) const {
    const uint8_t* from[R];
    for (int r = 0; r < R; r++) from[r] = w + n[r] * row_bytes();
    const Line* x = a.x + m0 * a.lines;
    F acc[R][M] = {};
    auto step = [&](const uint8_t* const* p, int64_t offset, int64_t line) __attribute__((always_inline)) {
      for (int r = 0; r < R; r++) prefetch(p[r] + offset + R * row_bytes());
      for (int v = 0; v < 32 / LANES; v++) {
        F wr[R];
        for (int r = 0; r < R; r++) wr[r] = Format::unpack(p[r] + offset, v);
        for (int m = 0; m < M; m++) {
          const F xm = load<F>(x[(line + v * LANES / 16) * M + m].at + v * LANES % 16);
          for (int r = 0; r < R; r++) acc[r][m] += wr[r] * xm;
        }
      }
    };
    const int64_t steps = K / 32, done = steps * Format::bytes;
    for (int64_t i = 0; i < steps; i++) step(from, i * Format::bytes, 2 * i);
    if (K % 32) {  // the last columns, padded with zeros
      uint8_t last[R][64] = {};
      for (int r = 0; r < R; r++) from[r] = (uint8_t*)std::memcpy(last[r], from[r] + done, row_bytes() - done);
      step(from, 0, 2 * steps);
    }
    for (int m = 0; m < M; m++)
      for (int r = 0; r < R; r++) out[m * R + r] = sum(acc[r][m]);
  }
};

// A block of 256 columns is 16 stretches of 16, one for each lane of 16 / LANES vectors. The 128 bytes of a block are two
// lines of 16 words, one for each stretch: nibble k of half e of word j of line l is column 16 j + 8 l + 2 k + e. It is
// left where it stands in its word, which makes it 2^(4 k + 16 e) times as large, and x that much smaller.
struct Int4 {
  static constexpr int64_t block = 256;
  static constexpr bool in_order = false;
  static constexpr int R(int M) { return M == 1 ? 4 : M <= 3 ? 3 : 2; }
  static constexpr int shift_of(int v) { return v / 2 % 4 * 4 + v % 2 * 16; }  // column v of a stretch
  static constexpr int64_t column(int64_t i) { return 16 * (i / (16 * LANES) * LANES + i % LANES) + i / LANES % 16; }
  static constexpr float factor(int64_t i) {
    const int s = shift_of(i / LANES % 16);
    return s == 28 ? 1 : 1.0f / (1 << s);  // there it is shifted, since a word's highest bit is a sign
  }
  const uint8_t* w;
  const uint32_t* scales;  // [N, groups]: fp16 scale in the upper half, fp16 zero in the lower
  int64_t blocks, groups;  // of one row
  int shift;               // log2 of the stretches in a group
  int64_t row_bytes() const { return blocks * 128; }

  static INLINE U spread(const uint32_t* p, int shift) {  // word i = p[i >> shift], reading no more than that
#ifdef __AVX2__
    const __m256i i = _mm256_srl_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm_cvtsi32_si128(shift));
    const __m256i wanted = _mm256_cmpgt_epi32(_mm256_set1_epi32(8 >> shift), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    return (U)_mm256_permutevar8x32_epi32(_mm256_maskload_epi32((const int*)p, wanted), i);
#else
    U v;
    for (int i = 0; i < LANES; i++) v[i] = p[i >> shift];
    return v;
#endif
  }

  template <int R, int M>
  void tile(const int64_t* n, const Activations& a, int64_t m0, float* out) const {
    const uint8_t* from[R];
    const uint32_t* group[R];
    for (int r = 0; r < R; r++) from[r] = w + n[r] * row_bytes(), group[r] = scales + n[r] * groups;
    const Line *x = a.x + m0 * a.lines, *sums = a.sums.data() + m0 * blocks;
    const int64_t ahead = R * row_bytes(), end = blocks;  // locals: the compiler keeps them in registers
    const int log2 = shift, step = 16 >> log2;
    F acc[R][M] = {};
    for (int64_t b = 0; b < end; b++, x += 16 * M, sums += M) {
      for (int r = 0; r < R; r++)  // scales too: without them this is half as fast
        prefetch(from[r] + ahead), prefetch(from[r] + ahead + 64), prefetch(group[r] + R * groups);
      for (int j0 = 0; j0 < 16; j0 += LANES) {
        F part[R][M], scale[R];
        for (int r = 0; r < R; r++) {
          const U s = spread(group[r] + (j0 >> log2), log2);
          scale[r] = high_fp16<F, I>(s);
          const F zero = high_fp16<F, I>(s << 16);
          for (int m = 0; m < M; m++) part[r][m] = zero * load<F>(sums[m].at + j0);
        }
#pragma GCC unroll 16
        for (int v = 0; v < 16; v++) {
          const int s = shift_of(v), at = j0 * 16 + v * LANES;  // of a row's 256 floats
          F wr[R];
          for (int r = 0; r < R; r++) {
            const I q = load<I>(from[r] + v / 8 * 64 + j0 * 4);
            wr[r] = __builtin_convertvector(s == 28 ? (I)((U)q >> 28) : q & (15 << s), F);
          }
          for (int m = 0; m < M; m++) {
            const F xm = load<F>(x[at / 16 * M + m].at + at % 16);
            for (int r = 0; r < R; r++) part[r][m] += wr[r] * xm;
          }
        }
        for (int r = 0; r < R; r++)
          for (int m = 0; m < M; m++) acc[r][m] += part[r][m] * scale[r];
      }
      for (int r = 0; r < R; r++) from[r] += 128, group[r] += step;
    }
    for (int m = 0; m < M; m++)
      for (int r = 0; r < R; r++) out[m * R + r] = sum(acc[r][m]);
  }
};
#endif

// --------------------------------------------------------------------------------------------------------- drivers
// f(first, last) over [0, N) on PyTorch's threads, in chunks that whoever is free takes: a core that another process
// holds for a moment then delays one chunk, not half the rows. Less than THREAD_BYTES is not worth waking a thread.
constexpr int64_t CHUNK_BYTES = 1 << 18, THREAD_BYTES = 1 << 18;

template <class F>
void parallel_rows(int64_t N, int64_t row_bytes, const F& f) {
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), N * row_bytes / THREAD_BYTES);
  if (threads < 2) return f(0, N);
  const int64_t chunk = (std::min(CHUNK_BYTES / row_bytes, (N - 1) / threads) / 24 + 1) * 24;  // 24: whole tiles
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t n; (n = next.fetch_add(chunk)) < N;) f(n, std::min(n + chunk, N));
  });
}

struct Output {  // y[m, n] = sum * scale[n] + bias[n], in x's dtype
  void* y;
  bool is_float;
  int64_t N;
  const float *scale, *bias;  // either may be null
  void put(int64_t m, int64_t n, float sum) const {
    sum = sum * (scale ? scale[n] : 1) + (bias ? bias[n] : 0);
    if (is_float) ((float*)y)[m * N + n] = sum;
    else ((uint16_t*)y)[m * N + n] = round_bf16(sum);
  }
};

template <int M, class W>
void rows(const W& w, const Activations& a, int64_t m0, int64_t first, int64_t last, const Output& y) {
  constexpr int R = W::R(M);
  float out[M * R];
  for (int64_t n0 = first; n0 < last; n0 += R) {
    int64_t n[R];
    for (int r = 0; r < R; r++) n[r] = std::min(n0 + r, last - 1);  // beyond the end: the last row once more
    w.template tile<R, M>(n, a, m0, out);
    for (int m = 0; m < M; m += a.parts)
      for (int r = 0; r < R && n0 + r < last; r++) {
        float s = 0;
        for (int p = a.parts - 1; p >= 0; p--) s += out[(m + p) * R + r];  // the small parts first
        y.put((m0 + m) / a.parts, n[r], s);
      }
  }
}

template <class W>
Tensor linear(const W& w, const Tensor& x, int64_t N, const float* scale, const std::optional<Tensor>& bias) {
  const auto sizes = x.sizes();
  const int64_t dim = x.dim(), K = sizes[dim - 1];
  const bool is_float = x.scalar_type() == ScalarType::Float;
  STD_TORCH_CHECK(is_float || x.scalar_type() == ScalarType::BFloat16, "x must be bfloat16 or float32");
  STD_TORCH_CHECK(x.is_contiguous(), "x must be contiguous");
  std::vector<int64_t> shape(sizes.begin(), sizes.end()), strides(dim, 1);
  shape[dim - 1] = N;
  for (int64_t d = dim - 2; d >= 0; d--) strides[d] = strides[d + 1] * shape[d + 1];
  AtenTensorHandle handle;
  aoti_torch_empty_strided(dim, shape.data(), strides.data(),
      is_float ? aoti_torch_dtype_float32() : aoti_torch_dtype_bfloat16(), aoti_torch_device_type_cpu(), 0, &handle);
  Tensor y(handle);
  const Activations a(x, K, w);
  const Output out{y.mutable_data_ptr(), is_float, N, scale, bias ? (const float*)bias->const_data_ptr() : nullptr};
  STD_TORCH_CHECK(!bias || (bias->scalar_type() == ScalarType::Float && bias->numel() == N), "bias: float32 [N]");
  parallel_rows(N, w.row_bytes(), [&](int64_t first, int64_t last) {
    for (int64_t m = 0; m < a.rows;) {  // after the first of these the chunk's weights are in L2
      const int64_t count = a.count(m);
      switch (count) {
        case 1: rows<1>(w, a, m, first, last, out); break;
        case 2: rows<2>(w, a, m, first, last, out); break;
        case 3: rows<3>(w, a, m, first, last, out); break;
        case 4: rows<4>(w, a, m, first, last, out); break;
        case 5: rows<5>(w, a, m, first, last, out); break;
        case 6: rows<6>(w, a, m, first, last, out); break;
        case 7: rows<7>(w, a, m, first, last, out); break;
        default: rows<8>(w, a, m, first, last, out);
      }
      m += count;
    }
  });
  return y;
}

void check(const Tensor& t, ScalarType dtype, int64_t rows, int64_t columns, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == dtype && t.is_contiguous() && t.is_cpu() && t.size(0) == rows &&
      (columns < 0 || t.size(1) == columns), name, ": wrong dtype, shape, strides or device");
}

Tensor linear_bf16(Tensor x, Tensor w, std::optional<Tensor> bias) {
  const int64_t N = w.size(0), K = x.size(-1);
  check(w, ScalarType::BFloat16, N, K, "w");
  return linear(Plain<Bf16>{(const uint8_t*)w.const_data_ptr(), K}, x, N, nullptr, bias);
}

Tensor linear_int8(Tensor x, Tensor w, Tensor scale, std::optional<Tensor> bias) {
  const int64_t N = w.size(0), K = x.size(-1);
  check(w, ScalarType::Char, N, K, "w");
  check(scale, ScalarType::Float, N, -1, "scale");
  return linear(Plain<Int8>{(const uint8_t*)w.const_data_ptr(), K}, x, N, (const float*)scale.const_data_ptr(), bias);
}

Int4 int4(const Tensor& w, const Tensor& scales, int64_t groupsize) {
  const int64_t N = w.size(0), blocks = w.size(1) / 128, groups = blocks * 256 / groupsize;
  STD_TORCH_CHECK(groupsize == 32 || groupsize == 64 || groupsize == 128, "groupsize must be 32, 64 or 128");
  check(w, ScalarType::Byte, N, blocks * 128, "w");
  check(scales, ScalarType::Int, N, groups, "scales");
  return {(const uint8_t*)w.const_data_ptr(), (const uint32_t*)scales.const_data_ptr(), blocks, groups,
          groupsize == 32 ? 1 : groupsize == 64 ? 2 : 3};
}

Tensor linear_int4(Tensor x, Tensor w, Tensor scales, int64_t groupsize, std::optional<Tensor> bias) {
  const Int4 w4 = int4(w, scales, groupsize);
  STD_TORCH_CHECK((x.size(-1) + 255) / 256 == w4.blocks, "x and w differ in columns");
  return linear(w4, x, w.size(0), nullptr, bias);
}

// ---------------------------------------------------------------------------------------------------- dequantising
INLINE void store(float* y, Floats v, int64_t count = 16) { std::memcpy(y, &v, count * 4); }
INLINE void store(uint16_t* y, Floats v, int64_t count = 16) {  // rounded to bf16 as in round_bf16()
  using Shorts = uint16_t __attribute__((vector_size(32)));
  const Words b = (Words)v;
  const Shorts s = __builtin_convertvector((b + 0x7fff + (b >> 16 & 1)) >> 16 | ((Words)(v != v) & 0x7fc0), Shorts);
  std::memcpy(y, &s, count * 2);
}

template <class T>
void int8_rows(const int8_t* q, const float* scale, int64_t K, int64_t first, int64_t last, T* y) {
  using Bytes = int8_t __attribute__((vector_size(16)));
  for (int64_t n = first; n < last; n++) {
    int64_t k = n * K;
    for (; k + 16 <= (n + 1) * K; k += 16) store(y + k, __builtin_convertvector(load<Bytes>(q + k), Floats) * scale[n]);
    for (; k < (n + 1) * K; k++) store(y + k, Floats{q[k] * scale[n]}, 1);
  }
}

template <class T>
void int4_rows(const Int4& w, int64_t K, int64_t first, int64_t last, T* y) {
  const Words shifts = {0, 16, 4, 20, 8, 24, 12, 28, 0, 16, 4, 20, 8, 24, 12, 28};
  for (int64_t n = first; n < last; n++)
    for (int64_t k = 0; k < K; k += 16) {  // a stretch of 16 columns: word k % 256 / 16 of each of a block's two lines
      const auto* p = (const uint32_t*)(w.w + n * w.row_bytes() + k / 256 * 128) + k % 256 / 16;
      const uint32_t a = p[0], b = p[16], s = w.scales[n * w.groups + (k / 16 >> w.shift)];
      const Words q = Words{a, a, a, a, a, a, a, a, b, b, b, b, b, b, b, b} >> shifts & 15;
      const Floats scale_zero = high_fp16(Words{s, s << 16});
      store(y + n * K + k, (__builtin_convertvector((Ints)q, Floats) - scale_zero[1]) * scale_zero[0]);
    }
}

Tensor dequantize_int8(Tensor w, Tensor scale, ScalarType dtype) {
  const int64_t N = w.size(0), K = w.size(1);
  check(w, ScalarType::Char, N, K, "w");
  check(scale, ScalarType::Float, N, -1, "scale");
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, "dtype must be bfloat16 or float32");
  Tensor result = torch::stable::new_empty(w, {N, K}, dtype);
  const auto* q = (const int8_t*)w.const_data_ptr();
  const auto* s = (const float*)scale.const_data_ptr();
  void* y = result.mutable_data_ptr();
  parallel_rows(N, K, [&](int64_t first, int64_t last) {
    if (dtype == ScalarType::Float) int8_rows(q, s, K, first, last, (float*)y);
    else int8_rows(q, s, K, first, last, (uint16_t*)y);
  });
  return result;
}

Tensor dequantize_int4(Tensor w, Tensor scales, int64_t groupsize, int64_t K, ScalarType dtype) {
  const Int4 w4 = int4(w, scales, groupsize);
  STD_TORCH_CHECK(K % groupsize == 0 && (K + 255) / 256 == w4.blocks, "K does not fit w");
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, "dtype must be bfloat16 or float32");
  Tensor result = torch::stable::new_empty(w, {w.size(0), K}, dtype);
  void* y = result.mutable_data_ptr();
  parallel_rows(w.size(0), w4.row_bytes(), [&](int64_t first, int64_t last) {
    if (dtype == ScalarType::Float) int4_rows(w4, K, first, last, (float*)y);
    else int4_rows(w4, K, first, last, (uint16_t*)y);
  });
  return result;
}

STABLE_TORCH_LIBRARY(hotloop, m) {
  m.def("linear_bf16(Tensor x, Tensor w, Tensor? bias) -> Tensor");
  m.def("linear_int8(Tensor x, Tensor w, Tensor scale, Tensor? bias) -> Tensor");
  m.def("linear_int4(Tensor x, Tensor w, Tensor scales, int groupsize, Tensor? bias) -> Tensor");
  m.def("dequantize_int8(Tensor w, Tensor scale, ScalarType dtype) -> Tensor");
  m.def("dequantize_int4(Tensor w, Tensor scales, int groupsize, int K, ScalarType dtype) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(hotloop, CPU, m) {
  m.impl("linear_bf16", TORCH_BOX(&linear_bf16));
  m.impl("linear_int8", TORCH_BOX(&linear_int8));
  m.impl("linear_int4", TORCH_BOX(&linear_int4));
  m.impl("dequantize_int8", TORCH_BOX(&dequantize_int8));
  m.impl("dequantize_int4", TORCH_BOX(&dequantize_int4));
}
