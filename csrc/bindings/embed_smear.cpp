// embed_smear for Python.
#include "embed_smear.h"

#include <cmath>

#include "bindings/bindings.h"
#include "bindings/checks.h"

namespace py = pybind11;

namespace pgolf::bindings {
namespace {

EmbedSmearShape checked_shape(int table_dtype, int x_dtype, int64_t n, int64_t t, int64_t vocab,
                              int64_t width, double eps) {
  count_of({{"n", n}, {"t", t}, {"width", width}});
  count_of({{"vocab", vocab}, {"width", width}});
  if (width < 1 || width > kMaxSmearWidth) {
    refuse("width", width, "rows may have 1 to " + std::to_string(kMaxSmearWidth) + " elements");
  }
  if (!(eps >= 0 && std::isfinite(eps))) refuse("eps", eps, "it has to be 0 or more, and finite");
  const Dtype table = checked_dtype("table_dtype", table_dtype);
  const Dtype x = checked_dtype("x_dtype", x_dtype);
  if ((table == Dtype::fp64) != (x == Dtype::fp64)) {
    refuse("table_dtype", table_dtype, "both or none of table_dtype and x_dtype may be 2 (fp64)");
  }
  return {n, t, vocab, width, eps, table, x};
}

int64_t tokens_of(const EmbedSmearShape& shape) { return shape.batch * shape.time; }

EmbedSmearInputs checked_inputs(const EmbedSmearShape& shape, Address ids, Address table,
                                Address bigram, Address scale, Address gate, Address starts) {
  check_pointer("ids", ids, tokens_of(shape));
  check_pointer("table", table, shape.vocab * shape.width);
  return {pointer<const int64_t>(ids), pointer<const void>(table), pointer<const void>(bigram),
          pointer<const void>(scale),  pointer<const void>(gate),  pointer<const bool>(starts)};
}

EmbedSmearGradients checked_gradients(const EmbedSmearShape& shape, Address bigram, Address dx,
                                      Address rstd, Address dtable, Address dbigram, Address sums) {
  const int64_t count = tokens_of(shape) * shape.width;
  check_pointer("dx", dx, count);
  check_pointer("rstd", rstd, tokens_of(shape));
  check_pointer("dtable", dtable, shape.vocab * shape.width);
  check_pointer("dbigram", dbigram, bigram ? count : 0);
  check_pointer("sums", sums, shape.width + 1);
  return {pointer<void>(dtable), bigram ? pointer<void>(dbigram) : nullptr, pointer<void>(sums)};
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
  return {pointer<void>(pieces), pointer<void>(partials)};
}

TokenOrder checked_order(const EmbedSmearShape& shape, Address order, Address bounds) {
  check_pointer("order", order, tokens_of(shape));
  check_pointer("bounds", bounds, shape.vocab + 1);
  return {pointer<const int64_t>(order), pointer<const int64_t>(bounds)};
}

void check_ids(const int64_t* ids, int64_t count, int64_t vocab) {
  for (int64_t i = 0; i < count; ++i) {
    if (ids[i] < 0 || ids[i] >= vocab) {
      refuse("ids[" + std::to_string(i) + "]", ids[i],
             "the table has " + std::to_string(vocab) + " rows");
    }
  }
}

void embed_smear(Address ids, Address table, Address bigram, Address scale, Address gate,
                 Address starts, Address x, Address rstd, int table_dtype, int x_dtype, int64_t n,
                 int64_t t, int64_t vocab, int64_t width, double eps, int threads) {
  const EmbedSmearShape shape = checked_shape(table_dtype, x_dtype, n, t, vocab, width, eps);
  const EmbedSmearInputs in = checked_inputs(shape, ids, table, bigram, scale, gate, starts);
  check_pointer("x", x, tokens_of(shape) * width);
  check_pointer("rstd", rstd, tokens_of(shape));
  check_ids(in.ids, tokens_of(shape), vocab);
  cpu::kernels().embed_smear(shape, in, pointer<void>(x), pointer<void>(rstd),
                             checked_threads(threads));
}

void embed_smear_backward(Address ids, Address table, Address bigram, Address scale, Address gate,
                          Address starts, Address order, Address bounds, Address dx, Address rstd,
                          Address dtable, Address dbigram, Address sums, Address pieces,
                          int64_t piece_rows, Address partials, int64_t partial_rows,
                          int table_dtype, int x_dtype, int64_t n, int64_t t, int64_t vocab,
                          int64_t width, double eps, int threads) {
  const EmbedSmearShape shape = checked_shape(table_dtype, x_dtype, n, t, vocab, width, eps);
  const EmbedSmearInputs in = checked_inputs(shape, ids, table, bigram, scale, gate, starts);
  const TokenOrder tokens = checked_order(shape, order, bounds);
  const auto out = checked_gradients(shape, bigram, dx, rstd, dtable, dbigram, sums);
  const auto scratch = checked_scratch(shape, pieces, piece_rows, partials, partial_rows);
  cpu::kernels().embed_smear_backward(shape, in, tokens, pointer<const void>(dx),
                                      pointer<const void>(rstd), out, scratch,
                                      checked_threads(threads));
}

// A counting sort: order[bounds[id] ..] are the places of id in ids, ascending.
void token_order(Address ids, int64_t count, int64_t vocab, Address order, Address bounds) {
  count_of({{"count", count}});
  count_of({{"vocab", vocab}});
  check_pointer("ids", ids, count);
  check_pointer("order", order, count);
  check_pointer("bounds", bounds, vocab + 1);
  const int64_t* const from = pointer<const int64_t>(ids);
  check_ids(from, count, vocab);
  int64_t* const to = pointer<int64_t>(order);
  int64_t* const next = pointer<int64_t>(bounds);  // at first, one further: ends as bounds
  for (int64_t id = 0; id <= vocab; ++id) next[id] = 0;
  for (int64_t i = 0; i < count; ++i) ++next[from[i]];
  for (int64_t id = 1; id <= vocab; ++id) next[id] += next[id - 1];
  for (int64_t i = count - 1; i >= 0; --i) to[--next[from[i]]] = i;
}

#if PGOLF_CUDA
void embed_smear_cuda(Address ids, Address table, Address bigram, Address scale, Address gate,
                      Address starts, Address x, Address rstd, int table_dtype, int x_dtype,
                      int64_t n, int64_t t, int64_t vocab, int64_t width, double eps,
                      Address stream) {
  checked_cuda_dtype("table_dtype", table_dtype);
  const EmbedSmearShape shape = checked_shape(table_dtype, x_dtype, n, t, vocab, width, eps);
  const EmbedSmearInputs in = checked_inputs(shape, ids, table, bigram, scale, gate, starts);
  check_pointer("x", x, tokens_of(shape) * width);
  check_pointer("rstd", rstd, tokens_of(shape));
  check_launch(cuda::embed_smear(shape, in, pointer<void>(x), pointer<void>(rstd),
                                 pointer<void>(stream)));
}

void embed_smear_backward_cuda(Address ids, Address table, Address bigram, Address scale,
                               Address gate, Address starts, Address order, Address bounds,
                               Address dx, Address rstd, Address dtable, Address dbigram,
                               Address sums, Address pieces, int64_t piece_rows, Address partials,
                               int64_t partial_rows, int table_dtype, int x_dtype, int64_t n,
                               int64_t t, int64_t vocab, int64_t width, double eps,
                               Address stream) {
  checked_cuda_dtype("table_dtype", table_dtype);
  const EmbedSmearShape shape = checked_shape(table_dtype, x_dtype, n, t, vocab, width, eps);
  const EmbedSmearInputs in = checked_inputs(shape, ids, table, bigram, scale, gate, starts);
  const TokenOrder tokens = checked_order(shape, order, bounds);
  const auto out = checked_gradients(shape, bigram, dx, rstd, dtable, dbigram, sums);
  const auto scratch = checked_scratch(shape, pieces, piece_rows, partials, partial_rows);
  check_launch(cuda::embed_smear_backward(shape, in, tokens, pointer<const void>(dx),
                                          pointer<const void>(rstd), out, scratch,
                                          pointer<void>(stream)));
}
#endif

}  // namespace

void bind_embed_smear(py::module_& m) {
  using A = py::arg;
  const py::call_guard<py::gil_scoped_release> unlocked;
  const auto define = [&](const char* name, auto function, const char* last) {
    m.def(name, function, unlocked, A("ids"), A("table"), A("bigram"), A("scale"), A("gate"),
          A("starts"), A("x"), A("rstd"), A("table_dtype"), A("x_dtype"), A("n"), A("t"),
          A("vocab"), A("width"), A("eps"), A(last));
  };
  const auto define_backward = [&](const char* name, auto function, const char* last) {
    m.def(name, function, unlocked, A("ids"), A("table"), A("bigram"), A("scale"), A("gate"),
          A("starts"), A("order"), A("bounds"), A("dx"), A("rstd"), A("dtable"), A("dbigram"),
          A("sums"), A("pieces"), A("piece_rows"), A("partials"), A("partial_rows"),
          A("table_dtype"), A("x_dtype"), A("n"), A("t"), A("vocab"), A("width"), A("eps"),
          A(last));
  };
  m.def("token_order", &token_order, unlocked, A("ids"), A("count"), A("vocab"), A("order"),
        A("bounds"));
  define("embed_smear", &embed_smear, "threads");
  define_backward("embed_smear_backward", &embed_smear_backward, "threads");
#if PGOLF_CUDA
  define("embed_smear_cuda", &embed_smear_cuda, "stream");
  define_backward("embed_smear_backward_cuda", &embed_smear_backward_cuda, "stream");
#endif
}

}  // namespace pgolf::bindings
