// Gathers and scatters that no single stride describes: the windows of a convolution.
//
// An index is read as up to three digits (of a pixel: image, row, column; of a tap: row, column,
// channel). A step along a digit moves by a constant in memory and in the image, so that both the
// address of an element and whether it lies inside the image are sums over digits.
#pragma once

#include <stdint.h>
#include <string.h>

#include "cpu/simd.h"

namespace twinfuse::cpu::TWINFUSE_ISA {

inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t abs64(int64_t a) { return a < 0 ? -a : a; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

constexpr int kDigits = 3;

// What one step along a digit moves: elements of the data and of its mask, rows and columns of the
// image. Columns may be counted in elements, where channels lie next to each other.
struct Digit {
  int64_t size = 1, stride = 0, mask = 0, y = 0, x = 0;
};

struct Position {
  int64_t offset = 0, mask = 0, y = 0, x = 0;
};

// Slowest digit first.
struct Axis {
  Digit digits[kDigits];

  int64_t size() const { return digits[0].size * digits[1].size * digits[2].size; }
  // The last digit alone counts: the axis is a stride.
  bool single() const { return digits[0].size == 1 && digits[1].size == 1; }
  int64_t stride() const { return digits[kDigits - 1].stride; }

  // Joins neighbours that move alike, and moves what is left to the end.
  void simplify() {
    Digit joined[kDigits];
    int last = kDigits;
    for (int i = kDigits - 1; i >= 0; i--) {
      const Digit& d = digits[i];
      if (d.size == 1) continue;
      if (last < kDigits) {
        Digit& low = joined[last];
        if (d.stride == low.stride * low.size && d.mask == low.mask * low.size &&
            d.y == low.y * low.size && d.x == low.x * low.size) {
          low.size *= d.size;
          continue;
        }
      }
      joined[--last] = d;
    }
    for (int i = 0; i < kDigits; i++) digits[i] = joined[i];
  }
};

// A place on an axis, and what the digits up to it have moved.
struct Cursor {
  Position at;
  int64_t index[kDigits];

  void start(const Axis& axis, int64_t i, const Position& origin) {
    at = origin;
    for (int d = kDigits - 1; d >= 0; d--) index[d] = 0;
    for (int d = kDigits - 1; i > 0; d--) {
      // The slowest digit takes what is left: no division, and the end of the axis is a place too.
      const int64_t size = axis.digits[d].size;
      const int64_t rest = d == 0 ? i : i % size;
      i = d == 0 ? 0 : i / size;
      move(axis.digits[d], index[d] = rest);
    }
  }
  // Up to which the last digit alone moves.
  int64_t left(const Axis& axis) const { return axis.digits[kDigits - 1].size - index[2]; }

  // `n` is at most left().
  void advance(const Axis& axis, int64_t n) {
    int d = kDigits - 1;
    index[d] += n;
    move(axis.digits[d], n);
    for (; d > 0 && index[d] == axis.digits[d].size; d--) {
      move(axis.digits[d], -index[d]);
      index[d] = 0;
      index[d - 1]++;
      move(axis.digits[d - 1], 1);
    }
  }

 private:
  void move(const Digit& digit, int64_t n) {
    at.offset += n * digit.stride;
    at.mask += n * digit.mask;
    at.y += n * digit.y;
    at.x += n * digit.x;
  }
};

// Elements outside of [0, y_limit) x [0, x_limit) are zero.
struct Gather {
  Axis outer, inner;
  Position origin;
  bool bounded;
  int64_t y_limit, x_limit;

  // The whole inner axis lies inside the image.
  bool covers(const Position& from) const {
    if (!bounded) return true;
    Position least = from, most = from;
    for (const Digit& d : inner.digits) {
      (d.y < 0 ? least : most).y += (d.size - 1) * d.y;
      (d.x < 0 ? least : most).x += (d.size - 1) * d.x;
    }
    return least.y >= 0 && least.x >= 0 && most.y < y_limit && most.x < x_limit;
  }
};

struct Range {
  int64_t begin, end;
};

// The steps of `range` at which start + step * i is inside of [0, limit).
inline Range clip(int64_t start, int64_t step, int64_t limit, Range range) {
  if (step < 0) start = limit - 1 - start, step = -step;
  if (step == 0) {
    if (start < 0 || start >= limit) range.end = range.begin;
    return range;
  }
  if (start + step * range.begin < 0)
    range.begin = min64(range.end, step == 1 ? -start : ceil_div(-start, step));
  if (start + step * (range.end - 1) >= limit)
    range.end = max64(range.begin, step == 1 ? limit - start : ceil_div(limit - start, step));
  return range;
}

// Where the elements of an output matrix lie.
struct Scatter {
  Axis rows, cols;
  int64_t cols_used;  // of the last digit of the columns: what lies behind is not written
};

}  // namespace twinfuse::cpu::TWINFUSE_ISA
