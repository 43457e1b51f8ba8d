// The gradient of a bias alone, in the order in which the gradient of the weight would have summed
// it on the way.
#pragma once

#include "cpu/gemm.h"

namespace twinfuse::cpu::TWINFUSE_ISA {

// sums[j] = the sum of grad(r, j) over r, for `grad` with either of them outside. `splits` as of
// the weight's problem.
template <class T>
class GradBias {
  using E = Engine<T>;
  using Acc = typename E::Acc;
  using Unit = typename E::Unit;
  using Packed = typename E::Packed;
  static constexpr int64_t kColumns = 64;  // at most
  static constexpr int64_t kWidth = E::S::kWidth;

 public:
  GradBias(int64_t rows, int64_t cols, int64_t splits, bool cols_outer,
           const TwinfuseContext& context)
      : rows_(rows),
        cols_(cols),
        cols_outer_(cols_outer),
        split_length_(splits > 1 ? split_length<T>(rows, splits) : max64(rows, 1)),
        workers_(worth_waking(context,
                              kElementWork * static_cast<double>(rows) * static_cast<double>(cols),
                              ceil_div(cols, kWidth))),
        at_once_(min64(kColumns, round_up(ceil_div(cols, workers_), kWidth))) {}

  int64_t bytes() const { return workers_ * worker_bytes(); }

  // `continued`: on top of the sums that are there, which are of one split.
  void run(const Source<T>& grad, const TwinfuseContext& context, char* space, bool continued,
           Acc* sums) const {
    parallel_for(context, workers_, [&](int64_t worker) {
      char* packed = space + worker * worker_bytes();
      for (int64_t j = worker * at_once_; j < cols_; j += workers_ * at_once_) {
        const int64_t n = min64(at_once_, cols_ - j);
        SplitSum<Acc> total[kColumns];
        for (int64_t r0 = 0; r0 == 0 || r0 < rows_; r0 += split_length_) {
          Acc split[kColumns];
          for (int64_t i = 0; i < n; i++) split[i] = continued ? sums[j + i] : 0;
          sum_split(grad, r0, j, n, packed, split);
          for (int64_t i = 0; i < n; i++) total[i].add(split[i]);
        }
        for (int64_t i = 0; i < n; i++) sums[j + i] = total[i].value();
      }
    });
  }

 private:
  int64_t depth() const { return min64(max64(rows_, 1), E::kBlock); }
  // From one column to the next where they are outside, with room for the last transposed piece.
  int64_t stride() const { return round_up(depth(), E::kGroup * 16) + 16; }
  int64_t packed_bytes() const {
    const int64_t bytes = cols_outer_ ? stride() * static_cast<int64_t>(sizeof(Packed))
                                      : steps_of<T>(depth()) * static_cast<int64_t>(sizeof(Unit));
    return round_up(at_once_ * bytes, 64);
  }
  int64_t worker_bytes() const {
    const int64_t scratch = cols_outer_ ? transpose_scratch<T>(0) * sizeof(Packed) : 0;
    return packed_bytes() + round_up(scratch, 64);
  }

  // On top of what is there.
  void sum_split(const Source<T>& grad, int64_t r0, int64_t j, int64_t n, char* space,
                 Acc* split) const {
    const int64_t end = min64(rows_, r0 + split_length_);
    if constexpr (E::kGroup == 1)
      if (!cols_outer_ && !grad.gather && grad.inner == 1 && (!grad.mask || grad.mask_inner == 1))
        return with_mask(grad.mask, grad.relu_grad, [&](auto kind) {
          for (int64_t i = 0; i < n; i += 2 * kWidth)
            sum_dense<decltype(kind)::value>(grad, r0, end, j + i, n - i, split + i);
        });
    for (int64_t r = r0; r == r0 || r < end; r += E::kBlock) {
      const int64_t depth = min64(end - r, E::kBlock), steps = steps_of<T>(depth);
      if (cols_outer_) {
        Packed* packed = reinterpret_cast<Packed*>(space);
        pack_rows(grad, r, depth, j, n, packed, stride());
        add_row_sums<T>(packed, stride(), steps, n, false,
                        reinterpret_cast<Packed*>(space + packed_bytes()), split);
      } else {
        Unit* packed = reinterpret_cast<Unit*>(space);
        Lines<T> lines(grad, r);
        pack_steps(lines, depth, j, n, at_once_, packed, at_once_);
        add_sums<T>(packed, at_once_, steps, n, false, split);
      }
    }
  }

  // Two vectors of columns, straight from where they lie: in the order of `add_sums`.
  template <Mask kMask>
  static void sum_dense(const Source<T>& grad, int64_t r, int64_t end, int64_t j, int64_t n,
                        Acc* out) {
    using S = typename E::S;
    using V = typename S::V;
    const int counts[] = {static_cast<int>(min64(n, kWidth)),
                          static_cast<int>(max64(0, min64(n - kWidth, kWidth)))};
    const int vectors = n > kWidth ? 2 : 1;
    LevelSum<T> sum[] = {LevelSum<T>(S::load(out, counts[0])),
                         LevelSum<T>(S::load(out + kWidth, counts[1]))};
    while (r < end) {
      V run[] = {S::zero(), S::zero()};
      for (const int64_t run_end = min64(end, r + kSummedRun); r < run_end; r++)
        for (int v = 0; v < vectors; v++) {
          const T* p = grad.data + r * grad.outer + j + v * kWidth;
          const T* m = grad.mask + r * grad.mask_outer + j + v * kWidth;
          run[v] = S::add(run[v], load_masked<kMask>(p, m, counts[v]));
        }
      for (int v = 0; v < vectors; v++) sum[v].add(run[v]);
    }
    for (int v = 0; v < vectors; v++) S::store(out + v * kWidth, sum[v].value(), counts[v]);
  }

  const int64_t rows_, cols_;
  const bool cols_outer_;
  const int64_t split_length_, workers_, at_once_;
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
