// Linear layers with 8-bit weights, for processors with AVX-512 VNNI; gptlib/inference/int8/kernel.py
// compiles this file.
//
// Decoding a token reads every weight once, so the time that memory takes is the limit. One call
// therefore does all of a layer, on float32 in and out: it rounds the activations to bytes,
// multiplies, and applies scales, bias and outliers while the sums are in registers.
//
// The instruction vpdpbusd multiplies 4 unsigned bytes by 4 signed ones in each of 16 lanes and
// adds the products to 16 sums of 32 bits. So weights lie in panels of 32 outputs, in which 4
// inputs of one output are neighbours: (panels, K / 4, 32, 4), read from beginning to end.

#include <algorithm>
#include <cstring>
#include <memory>

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <immintrin.h>
#include <torch/library.h>

namespace {

constexpr int64_t PANEL = 32;        // outputs of a panel: two registers of sums for each row
constexpr int64_t MAX_ROWS = 8;      // rows that share one pass over a panel: 16 of 32 registers
constexpr int64_t BYTE_LIMIT = 127;  // activations become whole numbers from -127 to 127 ...
constexpr int64_t ZERO_BYTE = 128;   // ... and are stored with 128 added, as unsigned bytes
constexpr int64_t BYTES_A_THREAD = 65536;  // of weights: for fewer a thread is not worth its start

// Rounds one row of activations to bytes and returns its scale. Features whose mask is 0, the
// outliers, count as zeros. A row of zeros has the scale 0, one with a NaN the scale NaN.
float round_row(const float* x, const float* mask, int64_t K, uint8_t* bytes) {
  int32_t largest_bits = 0;  // floats without their sign are ordered like their bits, NaN above all
  for (int64_t k = 0; k < K; k++) {
    const float value = x[k] * mask[k];
    int32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    largest_bits = std::max(largest_bits, bits & 0x7fffffff);
  }
  float largest;
  std::memcpy(&largest, &largest_bits, sizeof largest);
  const float factor = largest > 0 ? BYTE_LIMIT / largest : 0;
  for (int64_t k = 0; k < K; k++) {
    const float shifted = x[k] * mask[k] * factor + (ZERO_BYTE + 0.5f);
    bytes[k] = static_cast<uint8_t>(static_cast<int32_t>(shifted));  // decimals are cut off
  }
  return largest / BYTE_LIMIT;
}

// The whole-number products of ROWS rows with one panel: sums[r][n] over k of x[r][k] w[n][k].
template <int ROWS>
void multiply(const uint8_t* x, const int8_t* panel, int64_t K, int32_t (*sums)[PANEL]) {
  __m512i low[ROWS], high[ROWS];
  // without being told to unroll, gcc keeps these arrays in memory and not in registers
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; r++) low[r] = high[r] = _mm512_setzero_si512();
  for (int64_t k = 0; k < K; k += 4) {
    const __m512i low_weights = _mm512_loadu_si512(panel);
    const __m512i high_weights = _mm512_loadu_si512(panel + 64);
    panel += 4 * PANEL;
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
      int32_t four_bytes;
      std::memcpy(&four_bytes, x + r * K + k, sizeof four_bytes);
      const __m512i inputs = _mm512_set1_epi32(four_bytes);
      low[r] = _mm512_dpbusd_epi32(low[r], inputs, low_weights);
      high[r] = _mm512_dpbusd_epi32(high[r], inputs, high_weights);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; r++) {
    _mm512_storeu_si512(sums[r], low[r]);
    _mm512_storeu_si512(sums[r] + 16, high[r]);
  }
}

using Multiply = void (*)(const uint8_t*, const int8_t*, int64_t, int32_t (*)[PANEL]);
constexpr Multiply MULTIPLY[MAX_ROWS] = {multiply<1>, multiply<2>, multiply<3>, multiply<4>,
                                         multiply<5>, multiply<6>, multiply<7>, multiply<8>};

// x (..., K) times the weights, plus bias: (..., N), float32.
//
// panels (P, padded K / 4, 32, 4): int8 weights, padded by zeros to 4 inputs and 32 outputs. Of
// each of the 32 P outputs: scale of its weights; zero_sum: 128 times the sum of its weights, which
// the added 128 puts into every product; bias. mask (K,): 0 for outliers, else 1. outliers (O,):
// their indices; outlier_weight (O, 32 P): their weights in float32.
at::Tensor int8_linear(const at::Tensor& input, const at::Tensor& panels, const at::Tensor& scale,
                       const at::Tensor& zero_sum, const at::Tensor& bias, const at::Tensor& mask,
                       const at::Tensor& outliers, const at::Tensor& outlier_weight, int64_t N) {
  const at::Tensor x = input.contiguous();
  const int64_t K = mask.numel(), padded_K = 4 * panels.size(1), R = x.numel() / K;
  TORCH_CHECK(x.size(-1) == K, "expected ", K, " features, found ", x.size(-1));
  auto sizes = x.sizes().vec();
  sizes.back() = N;
  at::Tensor y = at::empty(sizes, x.options());

  const float* px = x.const_data_ptr<float>();
  const float* pmask = mask.const_data_ptr<float>();
  const std::unique_ptr<uint8_t[]> bytes(new uint8_t[R * padded_K]);
  const std::unique_ptr<float[]> row_scale(new float[R]);
  at::parallel_for(0, R, 8192 / K + 1, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; r++) {
      row_scale[r] = round_row(px + r * K, pmask, K, &bytes[r * padded_K]);
      std::fill(&bytes[r * padded_K + K], &bytes[(r + 1) * padded_K], 0);
    }
  });

  const int8_t* ppanels = panels.const_data_ptr<int8_t>();
  const float* pscale = scale.const_data_ptr<float>();
  const int32_t* pzero_sum = zero_sum.const_data_ptr<int32_t>();
  const float* pbias = bias.const_data_ptr<float>();
  const int64_t* poutliers = outliers.const_data_ptr<int64_t>();
  const float* poutlier_weight = outlier_weight.const_data_ptr<float>();
  const int64_t n_outliers = outliers.numel(), padded_N = scale.numel();
  float* py = y.mutable_data_ptr<float>();
  const int64_t panels_a_thread = BYTES_A_THREAD / (padded_K * PANEL) + 1;
  at::parallel_for(0, padded_N / PANEL, panels_a_thread, [&](int64_t first, int64_t last) {
    for (int64_t n0 = first * PANEL; n0 < last * PANEL; n0 += PANEL) {
      for (int64_t r0 = 0; r0 < R; r0 += MAX_ROWS) {
        const int64_t rows = std::min(MAX_ROWS, R - r0);
        int32_t sums[MAX_ROWS][PANEL];
        MULTIPLY[rows - 1](&bytes[r0 * padded_K], ppanels + n0 * padded_K, padded_K, sums);
        for (int64_t r = 0; r < rows; r++) {
          float out[PANEL];
          for (int64_t n = 0; n < PANEL; n++) {
            const float product = static_cast<float>(sums[r][n] - pzero_sum[n0 + n]);
            out[n] = pbias[n0 + n] + product * (pscale[n0 + n] * row_scale[r0 + r]);
          }
          for (int64_t o = 0; o < n_outliers; o++) {
            const float value = px[(r0 + r) * K + poutliers[o]];
            const float* weights = poutlier_weight + o * padded_N + n0;
            for (int64_t n = 0; n < PANEL; n++) out[n] += value * weights[n];
          }
          std::copy_n(out, std::min(PANEL, N - n0), py + (r0 + r) * N + n0);
        }
      }
    }
  });
  return y;
}

}  // namespace

TORCH_LIBRARY(gptlib, library) {
  library.def(
      "int8_linear(Tensor input, Tensor panels, Tensor scale, Tensor zero_sum, Tensor bias, "
      "Tensor mask, Tensor outliers, Tensor outlier_weight, int N) -> Tensor");
}
TORCH_LIBRARY_IMPL(gptlib, CPU, library) { library.impl("int8_linear", int8_linear); }
