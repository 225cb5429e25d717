// The selective scans on CUDA: discretisation and tree scan in one.
#include "selective_scan.cuh"

namespace grootvl {

Tensor scan_maps(const SelectiveInputs& inputs, int64_t first, int64_t count, Direction direction, Tensor* kept) {
  const Tensor& x = inputs.x;
  const Tensor h = empty(x, {count, x.size(0), x.size(1), x.size(2)}, x.scalar_type());
  const bool keeps_h = direction == Direction::kUp;
  if (kept != nullptr) *kept = keeps_h ? h : empty_like(h);
  for_floating_type(x.scalar_type(), [&](auto value) {
    using scalar_t = decltype(value);
    using acc_t = Accumulation<scalar_t>;
    auto data = inputs.data<scalar_t, acc_t>(first, count);
    data.out = h.mutable_data_ptr<scalar_t>();
    if (kept != nullptr && !keeps_h) data.kept = kept->mutable_data_ptr<scalar_t>();
    with_pass<false>(direction, [&](auto pass) { return scan<pass(), true>(data, x, inputs.planned); });
  });
  return h;
}

namespace {

// How many scans are computed at once: few if maps are large, so that memory does not grow with the number of states; a
// scan of large maps keeps the GPU busy alone.
int64_t scans_at_once(const Tensor& x) {
  constexpr int64_t kBytes = int64_t{256} << 20;
  const int64_t bytes = x.scalar_type() == ScalarType::Double ? 8 : x.scalar_type() == ScalarType::Float ? 4 : 2;
  return std::max<int64_t>(1, kBytes / (std::max<int64_t>(x.numel(), 1) * bytes));
}

Tensor selective_scan(const Tensor& x, const Tensor& dt, const std::optional<Tensor>& dt_weight,
                      const std::optional<Tensor>& dt_bias, const Tensor& A_log, const Tensor& B,
                      const std::optional<Tensor>& C, const Tensor& parent, const Tensor& order,
                      const Tensor& subtree_size, std::string_view direction_name) {
  check_selective_scan(x, dt, dt_weight, dt_bias, A_log, B, C, parent, order, subtree_size);
  const Direction direction = parse_direction(direction_name);
  const DeviceGuard guard(x);
  const SelectiveInputs inputs(x, dt, dt_weight, dt_bias, A_log, B, C, parent, order, subtree_size);
  const int64_t states = inputs.scans();
  if (!C && A_log.dim() == 1) return reshaped(scan_maps(inputs, 0, 1, direction), x.sizes());
  if (C && direction != Direction::kBoth) return weighed_states(inputs, direction);
  if (!C) {
    const Tensor result = empty(x, {x.size(0), x.size(1), x.size(2), states}, x.scalar_type());
    for (int64_t n = 0; n < states; ++n) {
      copy(select(result, -1, n), reshaped(scan_maps(inputs, n, 1, direction), x.sizes()));
    }
    return result;
  }
  const int64_t at_once = scans_at_once(inputs.x);
  const Tensor y = empty(x, x.sizes(), at_once < states ? accumulation_type(x) : x.scalar_type());
  for (int64_t n = 0; n < states; n += at_once) {
    merge(scan_maps(inputs, n, std::min(at_once, states - n), direction), inputs.C, n, x, Tensor(), n > 0, y);
  }
  return to(y, x.scalar_type());
}

std::tuple<Tensor, Tensor> merged_scan(const Tensor& x, const Tensor& dt, const Tensor& dt_weight,
                                       const std::optional<Tensor>& dt_bias, const Tensor& A_log, const Tensor& B,
                                       const Tensor& C, const std::optional<Tensor>& D_skip, const Tensor& parent,
                                       const Tensor& order, const Tensor& subtree_size, std::string_view direction_name,
                                       std::optional<ScalarType> dtype, bool keep) {
  check_merged_scan(x, dt, dt_weight, dt_bias, A_log, B, C, D_skip, parent, order, subtree_size, dtype);
  const Direction direction = parse_one_sweep(direction_name);
  const DeviceGuard guard(x);
  const SelectiveInputs inputs(x, dt, dt_weight, dt_bias, A_log, B, C, parent, order, subtree_size, true);
  Tensor kept;
  const Tensor h = scan_maps(inputs, 0, inputs.scans(), direction, keep ? &kept : nullptr);
  const Tensor y = empty(x, x.sizes(), dtype.value_or(x.scalar_type()));
  merge(h, inputs.C, 0, inputs.x, D_skip ? contiguous(to(*D_skip, accumulation_type(x))) : Tensor(), false, y);
  return {y, keep ? kept : empty(x, {0}, x.scalar_type())};
}

}  // namespace
}  // namespace grootvl

STABLE_TORCH_LIBRARY_IMPL(grootvl_ops, CUDA, m) {
  m.impl("selective_scan", TORCH_BOX(&grootvl::selective_scan));
  m.impl("merged_scan", TORCH_BOX(&grootvl::merged_scan));
}
