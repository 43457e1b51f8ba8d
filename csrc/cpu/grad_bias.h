// The gradient of a bias alone, in the order in which the gradient of the weight would have summed
// it on the way.
#pragma once

#include "cpu/gemm.h"

namespace twinfuse::cpu::TWINFUSE_ISA {

// sums[j] = the sum of grad(r, j) over r; `grad` has r outside. `splits` as of the weight's
// problem.
template <class T>
class GradBias {
  using E = Engine<T>;
  using Acc = typename E::Acc;
  using Unit = typename E::Unit;
  static constexpr int64_t kColumns = 64;

 public:
  GradBias(int64_t rows, int64_t cols, int64_t splits, const TwinfuseContext& context)
      : rows_(rows),
        cols_(cols),
        split_length_(splits > 1 ? split_length<T>(rows, splits) : max64(rows, 1)),
        workers_(min64(max64(context.num_threads, 1), ceil_div(cols, kColumns))) {}

  int64_t bytes() const { return workers_ * worker_bytes(); }

  void run(const Source<T>& grad, const TwinfuseContext& context, char* space, Acc* sums) const {
    parallel_for(context, workers_, [&](int64_t worker) {
      Unit* packed = reinterpret_cast<Unit*>(space + worker * worker_bytes());
      for (int64_t j = worker * kColumns; j < cols_; j += workers_ * kColumns) {
        const int64_t n = min64(kColumns, cols_ - j);
        for (int64_t r0 = 0; r0 == 0 || r0 < rows_; r0 += split_length_) {
          Acc split[kColumns];
          sum_split(grad, r0, j, n, packed, split);
          for (int64_t i = 0; i < n; i++) sums[j + i] = r0 ? sums[j + i] + split[i] : split[i];
        }
      }
    });
  }

 private:
  int64_t worker_bytes() const {
    return kColumns * steps_of<T>(min64(max64(rows_, 1), E::kBlock)) * sizeof(Unit);
  }

  void sum_split(const Source<T>& grad, int64_t r0, int64_t j, int64_t n, Unit* packed,
                 Acc* split) const {
    const int64_t end = min64(rows_, r0 + split_length_);
    for (int64_t r = r0; r == r0 || r < end; r += E::kBlock) {
      const int64_t depth = min64(end - r, E::kBlock);
      Lines<T> lines(grad, r);
      pack_steps(lines, depth, j, n, kColumns, packed, kColumns);
      add_sums<T>(packed, kColumns, steps_of<T>(depth), n, r == r0, split);
    }
  }

  const int64_t rows_, cols_, split_length_, workers_;
};

// Rounds the sums to the type of the bias.
template <class T>
void store_grad_bias(const typename Convert<T>::Acc* sums, int64_t n, void* grad_bias,
                     int64_t stride) {
  DefaultFloatMode mode;
  T* out = static_cast<T*>(grad_bias);
  for (int64_t j = 0; j < n; j++)
    Convert<T>::store(out + j * stride, Simd<typename Convert<T>::Acc>::load(sums + j, 1), 1);
}

}  // namespace twinfuse::cpu::TWINFUSE_ISA
