// embed_smear: token embedding, norm and smear gate. The formulas, for CPU and GPU; F is float or
// double. With e_t the row of token t (and scale times its bigram), g = sigmoid(gate) and c_t = 1
// where t sees t - 1 (not at the start of a row or of a document)
//
//   n = rstd e,   rstd = 1 / sqrt(|e|^2 / D + eps),   x_t = (1 - g) n_t + g c_t n_{t-1}
//
// and the other way round, with d_t = dx_t and u_t = c_{t+1} d_{t+1}
//
//   dn_t = (1 - g) d_t + g u_t,   de = rstd (dn - n (dn . n) / D),
//   d_gate = g (1 - g) times the sum of n (u - d)
//
// Rows of the table get the sum of de over their tokens. Tokens are sorted by id and cut into
// chunks of positions. Of the pieces of a chunk, one an id, those amid it are whole sums; the first
// and the last may go on in the neighbours and become two rows of partial sums. What an id has of
// these is added up in order: no result depends on threads or on the size of a GPU.
#pragma once

#include <cmath>
#include <cstdint>

#include "kernels.h"
#include "rms_norm.h"

namespace pgolf {

struct EmbedSmearShape {
  int64_t batch, time, vocab, width;  // N, T, V, D
  double eps;
  Dtype table_dtype, x_dtype;  // fp64 both or none
};

// Contiguous. Null where there is none: bigram (N, T, D) of x's type, or with bigram_ids (N, T) a
// table (bigram_rows, D), scale (1,) (then it is 1) and gate (D,) in float, or double for double,
// starts (N, T).
struct EmbedSmearInputs {
  const int64_t* ids;  // (N, T)
  const void *table, *bigram, *scale, *gate;
  const bool* starts;
  const int64_t* bigram_ids;
  int64_t bigram_rows;
};

// Tokens sorted by id, stable, and where each id begins in that order: (V + 1,).
struct TokenOrder {
  const int32_t *order, *bounds;
};

// The ids (count,) of a table of `vocab` rows, and where their order and its bounds go.
struct TokenIds {
  const int64_t* ids;
  int64_t count, vocab;
  int32_t *order, *bounds;
};

// dbigram (N, T, D) is null where there is no bigram. sums (D + 1,): of the gate's columns and of
// the scale.
struct EmbedSmearGradients {
  void *dtable, *dbigram, *sums;
};

// Room for smear_chunks x 2 x D and for smear_blocks x (D + 1) numbers, in the type of sums.
struct EmbedSmearScratch {
  void *pieces, *partials;
};

constexpr int64_t kMaxSmearWidth = 768;      // D
constexpr int64_t kMaxOrderVocab = 32768;    // V that a GPU sorts tokens for
constexpr int64_t kSmearChunk = 32;          // positions
constexpr int64_t kSmearChunksPerBlock = 4;  // chunks with one row of sums for gate and scale

constexpr int64_t smear_chunks(int64_t positions) {
  return positions / kSmearChunk + (positions % kSmearChunk != 0);
}
constexpr int64_t smear_blocks(int64_t positions) {
  const int64_t chunks = smear_chunks(positions);
  return chunks / kSmearChunksPerBlock + (chunks % kSmearChunksPerBlock != 0);
}

template <typename F>
PGOLF_HOST_DEVICE static inline F sigmoid(F x) {
  return F(1) / (F(1) + std::exp(-x));
}

// Where the partial sums of an id are, whose sorted positions are [begin, end).
struct SmearPieces {
  int64_t first_chunk, last_chunk;
  bool whole;  // amid one chunk: its sum is complete and has no partial sums

  // The row of partial sums (chunks x 2) that holds the piece in a chunk.
  PGOLF_HOST_DEVICE int64_t row(int64_t chunk, int64_t begin) const {
    return 2 * chunk + (begin > chunk * kSmearChunk ? 1 : 0);
  }
};

PGOLF_HOST_DEVICE static inline SmearPieces smear_pieces(int64_t begin, int64_t end,
                                                         int64_t positions) {
  const int64_t first = begin / kSmearChunk, last = (end - 1) / kSmearChunk;
  const int64_t after = (last + 1) * kSmearChunk;
  const bool whole = first == last && begin > first * kSmearChunk &&
                     end < (after < positions ? after : positions);
  return {first, last, whole};
}

}  // namespace pgolf
