// embed_smear for Python.
#include "embed_smear.h"

#include "bindings/tensors.h"

namespace pgolf::bindings {
namespace {

template <typename On>
EmbedSmearShape checked_shape(int table_dtype, int x_dtype, int64_t n, int64_t t, int64_t vocab,
                              int64_t width, double eps) {
  count_of({{"n", n}, {"t", t}, {"width", width}});
  count_of({{"vocab", vocab}, {"width", width}});
  if (width < 1 || width > kMaxSmearWidth) {
    refuse("width", width, "rows may have 1 to " + std::to_string(kMaxSmearWidth) + " elements");
  }
  const Dtype table = checked_dtype<On>("table_dtype", table_dtype);
  const Dtype x = checked_dtype<On>("x_dtype", x_dtype);
  if ((table == Dtype::fp64) != (x == Dtype::fp64)) {
    refuse("table_dtype", table_dtype, "both or none of table_dtype and x_dtype may be 2 (fp64)");
  }
  return {n, t, vocab, width, eps, table, x};
}

int64_t tokens_of(const EmbedSmearShape& shape) { return shape.batch * shape.time; }

template <typename On>
EmbedSmearInputs checked_inputs(const EmbedSmearShape& shape, Address ids, Address table,
                                Address bigram, Address scale, Address gate, Address starts,
                                Address bigram_ids, int64_t bigram_rows) {
  const int64_t bigrams = count_of({{"bigram_rows", bigram_rows}, {"width", shape.width}});
  check_pointer("ids", ids, tokens_of(shape));
  check_pointer("table", table, shape.vocab * shape.width);
  if (bigram_ids) check_pointer("bigram", bigram, bigrams);
  if (On::on_cpu && bigram_ids) {
    check_ids("bigram_ids", bigram_ids, tokens_of(shape), bigram_rows);
  }
  return {ids, table, bigram, scale, gate, starts, bigram_ids, bigram_rows};
}

EmbedSmearGradients checked_gradients(const EmbedSmearShape& shape, Address bigram, Address dx,
                                      Address rstd, Address dtable, Address dbigram, Address sums) {
  const int64_t count = tokens_of(shape) * shape.width;
  check_pointer("dx", dx, count);
  check_pointer("rstd", rstd, tokens_of(shape));
  check_pointer("dtable", dtable, shape.vocab * shape.width);
  check_pointer("dbigram", dbigram, bigram ? count : 0);
  check_pointer("sums", sums, shape.width + 1);
  return {dtable, bigram ? dbigram : Address{0}, sums};
}

EmbedSmearScratch checked_scratch(const EmbedSmearShape& shape, Address pieces,
                                  int64_t piece_rows, Address partials, int64_t partial_rows) {
  const int64_t chunks = smear_chunks(tokens_of(shape)), blocks = smear_blocks(tokens_of(shape));
  if (piece_rows != 2 * chunks) {
    refuse("piece_rows", piece_rows, "it has to be " + std::to_string(2 * chunks));
  }
  if (partial_rows != blocks) {
    refuse("partial_rows", partial_rows, "it has to be " + std::to_string(blocks));
  }
  check_pointer("pieces", pieces, 2 * chunks * shape.width);
  check_pointer("partials", partials, blocks * (shape.width + 1));
  return {pieces, partials};
}

TokenOrder checked_order(const EmbedSmearShape& shape, Address order, Address bounds) {
  check_pointer("order", order, tokens_of(shape));
  check_pointer("bounds", bounds, shape.vocab + 1);
  return {order, bounds};
}

template <typename On>
void embed_smear(Address ids, Address table, Address bigram, Address scale, Address gate,
                 Address starts, Address bigram_ids, int64_t bigram_rows, Address x, Address rstd,
                 int table_dtype, int x_dtype, int64_t n,
                 int64_t t, int64_t vocab, int64_t width, double eps, On on) {
  const EmbedSmearShape shape = checked_shape<On>(table_dtype, x_dtype, n, t, vocab, width, eps);
  const EmbedSmearInputs in = checked_inputs<On>(shape, ids, table, bigram, scale, gate, starts,
                                                 bigram_ids, bigram_rows);
  check_pointer("x", x, tokens_of(shape) * width);
  check_pointer("rstd", rstd, tokens_of(shape));
  if (On::on_cpu) check_ids("ids", in.ids, tokens_of(shape), vocab);
  launch::embed_smear(on, shape, in, x, rstd);
}

template <typename On>
void embed_smear_backward(Address ids, Address table, Address bigram, Address scale, Address gate,
                          Address starts, Address bigram_ids, int64_t bigram_rows, Address order,
                          Address bounds, Address dx, Address rstd, Address dtable,
                          Address dbigram, Address sums, Address pieces,
                          int64_t piece_rows, Address partials, int64_t partial_rows,
                          int table_dtype, int x_dtype, int64_t n, int64_t t, int64_t vocab,
                          int64_t width, double eps, On on) {
  const EmbedSmearShape shape = checked_shape<On>(table_dtype, x_dtype, n, t, vocab, width, eps);
  const EmbedSmearInputs in = checked_inputs<On>(shape, ids, table, bigram, scale, gate, starts,
                                                 bigram_ids, bigram_rows);
  const TokenOrder tokens = checked_order(shape, order, bounds);
  const auto out = checked_gradients(shape, bigram, dx, rstd, dtable, dbigram, sums);
  const auto scratch = checked_scratch(shape, pieces, piece_rows, partials, partial_rows);
  launch::embed_smear_backward(on, shape, in, tokens, dx, rstd, out, scratch);
}

template <typename On>
void token_order(const Addresses& ids, const Sizes& counts, const Sizes& vocabs,
                 const Addresses& orders, const Addresses& bounds, On on) {
  check_length("counts", counts, ids.size());
  check_length("vocabs", vocabs, ids.size());
  check_length("orders", orders, ids.size());
  check_length("bounds", bounds, ids.size());
  std::vector<TokenIds> lists;
  for (size_t i = 0; i < ids.size(); ++i) {
    const int64_t count = count_of({{"counts", counts[i]}});
    const int64_t vocab = count_of({{"vocabs", vocabs[i]}});
    check_pointer("ids", ids[i], count);
    check_pointer("orders", orders[i], count);
    check_pointer("bounds", bounds[i], vocab + 1);
    if (count > INT32_MAX) refuse("counts", count, "it may be at most 2147483647");
    if (!On::on_cpu && vocab > kMaxOrderVocab) {
      refuse("vocabs", vocab, "it may be at most " + std::to_string(kMaxOrderVocab));
    }
    if (On::on_cpu) check_ids("ids", ids[i], count, vocab);
    lists.push_back({ids[i], count, vocab, orders[i], bounds[i]});
  }
  launch::token_order(on, lists.data(), static_cast<int>(lists.size()));
}

const Functions functions = {
    {
        PGOLF_BOTH(token_order, "ids counts vocabs orders bounds"),
        PGOLF_BOTH(embed_smear,
                   "ids table bigram scale gate starts bigram_ids bigram_rows x rstd table_dtype "
                   "x_dtype n t vocab width eps"),
        PGOLF_BOTH(embed_smear_backward,
                   "ids table bigram scale gate starts bigram_ids bigram_rows order bounds dx rstd "
                   "dtable dbigram sums pieces piece_rows partials partial_rows table_dtype "
                   "x_dtype n t vocab width eps"),
    },
    {
        {"embed_smear.WIDTH_LIMITS.cuda", kMaxSmearWidth},
        {"token_sums.ORDER_LIMITS.cuda", kMaxOrderVocab},
        {"embed_smear_kernels.CHUNK", kSmearChunk},
        {"embed_smear_kernels.CHUNKS_PER_BLOCK", kSmearChunksPerBlock},
    }};

}  // namespace
}  // namespace pgolf::bindings
