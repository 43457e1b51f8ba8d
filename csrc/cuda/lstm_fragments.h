// A thread's share of a product on tensor cores: 16 bytes of a group of the reduced dimension in
// each line. Thread q of four has the q-th 16 bytes, of weights and of states alike, so that the
// order in which the tensor cores see them is the same for both.
#pragma once

#include <type_traits>

#include "cuda/lstm_gates.h"

namespace twinfuse::cuda {

template <class Element>
constexpr int kVectorElements = 16 / static_cast<int>(sizeof(Element));

// Whether lines of a matrix can be read by 16 bytes, to their ends.
template <class Element>
TWINFUSE_DEVICE bool in_vectors(const void* data, int64_t line, int64_t step, int depth) {
  constexpr int kElements = kVectorElements<Element>;
  return step == 1 && line % kElements == 0 && depth % kElements == 0 &&
         reinterpret_cast<uintptr_t>(data) % 16 == 0;
}

// 16 bytes of a line from k on; zeros behind its end, and of a line that is not there.
template <bool kVectors, class Element>
TWINFUSE_DEVICE uint4 read_line(const Element* line, int64_t step, int k, int depth) {
  if constexpr (kVectors) {
    uint4 words = {};
    if (line && k < depth) words = *reinterpret_cast<const uint4*>(line + k);
    return words;
  } else {
    constexpr int kElements = kVectorElements<Element>;
    union {
      uint4 words = {};
      Element elements[kElements];
    } both;
    if (!line) return both.words;
    line += k * step;
#pragma unroll
    for (int i = 0; i < kElements; i++, line += step)
      if (k + i < depth) both.elements[i] = *line;
    return both.words;
  }
}

// Weights of a group, of two lines that are 8 apart, as a thread keeps them.
template <class Format>
TWINFUSE_DEVICE void interleave(uint32_t (&weights)[2][4], const uint4& line, const uint4& other) {
  const uint32_t words[2][4] = {{line.x, other.x, line.y, other.y},
                                {line.z, other.z, line.w, other.w}};
#pragma unroll
  for (int half = 0; half < 2; half++)
#pragma unroll
    for (int i = 0; i < 4; i++) weights[half][i] = Format::word(words[half][i]);
}

// Adds the product of a group to two sums in turn, which saves waiting; where a format does not
// add up in tensor cores, to the first of them.
template <class Format, int kColumns>
TWINFUSE_DEVICE void add_group(float (&even)[kColumns][4], float (&odd)[kColumns][4],
                               const uint32_t (&weights)[2][4], const uint4 (&states)[kColumns]) {
  const typename Format::Weight first = Format::weight(weights[0]);
  const typename Format::Weight second = Format::weight(weights[1]);
#pragma unroll
  for (int column = 0; column < kColumns; column++) {
    const uint4& words = states[column];
    const typename Format::State low = Format::state(words.x, words.y);
    const typename Format::State high = Format::state(words.z, words.w);
    if constexpr (Format::kApart) {
      float sums[4] = {};
      Format::product(sums, first, low);
      Format::product(sums, second, high);
#pragma unroll
      for (int i = 0; i < 4; i++) even[column][i] += sums[i];
    } else {
      Format::product(even[column], first, low);
      Format::product(odd[column], second, high);
    }
  }
}

// `body` with the number of columns as a constant: of sequences that are not there nothing is read.
template <int kColumns, class Body>
TWINFUSE_DEVICE void for_columns(int sequences, const Body& body) {
  const int columns = (sequences + 7) / 8;
  if constexpr (kColumns > 1)
    if (columns == 1) return body(std::integral_constant<int, 1>());
  if constexpr (kColumns > 2)
    if (columns == 2) return body(std::integral_constant<int, 2>());
  body(std::integral_constant<int, kColumns>());
}

}  // namespace twinfuse::cuda
