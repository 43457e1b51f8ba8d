// What the cells of both passes have: the call, the block's share of it, and its memory.
#pragma once

#include "cuda/lstm_slice.h"

namespace twinfuse::cuda {

template <class T, class E, class Shape>
struct LstmCells : Shape {
  using Arguments = T;
  using Element = E;
  using Memory = typename Shape::Memory;

 protected:
  static constexpr int kCells = Slice<Element, Shape>::kCells;

  TWINFUSE_DEVICE LstmCells(const Arguments& p, Memory& memory)
      : p_(p), s_(p.shared), memory_(memory) {}

  const Arguments& p_;
  const Slice<Element, Shape> s_;
  Memory& memory_;
};

}  // namespace twinfuse::cuda
