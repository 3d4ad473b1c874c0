// param_update for Python.
#include "bindings/tensors.h"
#include "param_update.h"

namespace pgolf::bindings {
namespace {

struct Updates {
  std::vector<UpdateTensor> tensors;
  int64_t chunks = 0;

  int count() const { return static_cast<int>(tensors.size()); }
};

// An address of 0 says that a tensor has no such companion.
Updates checked_updates(const Addresses& params, const Addresses& sources,
                        const Addresses& exp_avgs, const Addresses& exp_avg_sqs,
                        const Addresses& averages, const Sizes& counts, const Codes& param_dtypes,
                        const Codes& source_dtypes, const Codes& state_dtypes,
                        const std::vector<float>& scales, const Codes& groups, Address scalars,
                        int rows, Address norm) {
  for (const Addresses* column : {&sources, &exp_avgs, &exp_avg_sqs, &averages}) {
    check_length("a column of addresses", *column, params.size());
  }
  for (const Codes* column : {&param_dtypes, &source_dtypes, &state_dtypes, &groups}) {
    check_length("a column of codes", *column, params.size());
  }
  check_length("counts", counts, params.size());
  check_length("scales", scales, params.size());
  check_pointer("scalars", scalars, 1);
  check_pointer("norm", norm, 1);
  Updates list;
  for (size_t i = 0; i < params.size(); ++i) {
    const int64_t first = list.chunks, count = counts[i];
    list.chunks = checked_chunks(first, count);
    const Dtype param_dtype = checked_element("params", params[i], count, param_dtypes[i]);
    const Dtype source_dtype = checked_element("sources", sources[i], count, source_dtypes[i]);
    const Dtype state_dtype = checked_float_dtype("state_dtypes", state_dtypes[i]);
    if (exp_avgs[i] || exp_avg_sqs[i]) {
      checked_element("exp_avgs", exp_avgs[i], count, state_dtypes[i]);
      checked_element("exp_avg_sqs", exp_avg_sqs[i], count, state_dtypes[i]);
    }
    if (averages[i]) checked_element("averages", averages[i], count, 0);
    if (groups[i] < 0 || groups[i] >= rows) {
      refuse("groups", groups[i], "scalars has " + std::to_string(rows) + " rows");
    }
    list.tensors.push_back({params[i], sources[i],
                            exp_avgs[i], exp_avg_sqs[i],
                            averages[i], count, first, scales[i], groups[i],
                            param_dtype, source_dtype, state_dtype});
  }
  return list;
}

template <typename On>
void param_update(const Addresses& params, const Addresses& sources, const Addresses& exp_avgs,
                  const Addresses& exp_avg_sqs, const Addresses& averages, const Sizes& counts,
                  const Codes& param_dtypes, const Codes& source_dtypes, const Codes& state_dtypes,
                  const std::vector<float>& scales, const Codes& groups, Address scalars, int rows,
                  Address norm, On on) {
  const Updates list = checked_updates(params, sources, exp_avgs, exp_avg_sqs, averages, counts,
                                       param_dtypes, source_dtypes, state_dtypes, scales, groups,
                                       scalars, rows, norm);
  launch::param_update(on, list.tensors.data(), list.count(), list.chunks,
                              scalars, norm);
}

const Functions functions = {
    {PGOLF_BOTH(param_update,
                "params sources exp_avgs exp_avg_sqs averages counts param_dtypes "
                "source_dtypes state_dtypes scales groups scalars rows norm")},
    {
#define PGOLF_COLUMN(name)                                                              \
  {"multi_tensor.COLUMNS." #name, offsetof(UpdateScalars, name) / sizeof(float)},
        PGOLF_UPDATE_SCALARS(PGOLF_COLUMN)
#undef PGOLF_COLUMN
    }};

}  // namespace
}  // namespace pgolf::bindings
