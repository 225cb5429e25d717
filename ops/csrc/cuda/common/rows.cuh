// Blocks that go over the rows of a matrix.
#pragma once

#include <algorithm>

#include "device.cuh"

namespace grootvl {

constexpr int kRowThreads = 256;  // of a block, about
constexpr int kMaxRowWords = 64;  // of a row in a block

// A thread has the same word of neighbouring columns of many rows: threadIdx.x says which of its block's words, and
// blockIdx.x which of the parts of a row; threadIdx.y and blockIdx.y say with which row it begins.
struct RowBlocks {
  // For a matrix (rows, columns), `at_once` blocks on a multiprocessor, and threads that load `ahead` rows together.
  RowBlocks(const Tensor& matrix, int word, int at_once, int ahead) {
    const int64_t words = (matrix.size(1) + word - 1) / word, across = (words + kMaxRowWords - 1) / kMaxRowWords;
    block.x = (words + across - 1) / across;
    block.y = std::max<int64_t>(1, kRowThreads / block.x);
    grid.x = across;
    const int64_t rows = ahead * block.y, most = current_limits().multiprocessors * int64_t(at_once) / across;
    grid.y = std::min((matrix.size(0) + rows - 1) / rows, std::max<int64_t>(1, most));
  }

  // Of sums of the columns of a word for each thread.
  template <int kWord, typename acc_t>
  size_t shared() const {
    return sizeof(acc_t) * kWord * block.x * block.y;
  }

  dim3 grid, block;
};

}  // namespace grootvl
