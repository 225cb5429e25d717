// Gradients of the operations: what each saves for its backward pass, and the operation that computes this. In C++,
// because a gradient that is registered in Python takes the host longer than launching all kernels of its operation.
// A library of its own, since it needs more than PyTorch's stable ABI: it fits the release that it was built against.
// grootvl_ops/_registration.py has the same in Python, for all others; a test compares the two.
#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/as_strided_native.h>
#include <c10/core/Event.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/library.h>
#include <torch/version.h>

#include <array>
#include <deque>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

namespace grootvl {
namespace {

using at::Tensor;
using torch::autograd::variable_list;

template <class Signature>
c10::TypedOperatorHandle<Signature> find_operation(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// Calls an operation. Kernels on the stable ABI cannot throw PyTorch's errors: the one for wrong values, which PyTorch
// until 2.14 makes of `std::invalid_argument`, and the one for the end of GPU memory. Here theirs are replaced by
// these.
template <class Signature, class... Args>
auto call(const c10::TypedOperatorHandle<Signature>& operation, const Args&... args) {
  try {
    return operation.call(args...);
  } catch (const std::invalid_argument& error) {
    C10_THROW_ERROR(ValueError, error.what());
  } catch (const std::runtime_error& error) {
    constexpr std::string_view out_of_memory = "CUDA out of memory.";
    if (std::string_view(error.what()).substr(0, out_of_memory.size()) != out_of_memory) throw;
    C10_THROW_ERROR(OutOfMemoryError, error.what());
  }
}

template <class Signature, class... Args>
auto call_below_autograd(const c10::TypedOperatorHandle<Signature>& operation, const Args&... args) {
  at::AutoDispatchBelowADInplaceOrView guard;
  return call(operation, args...);
}

// From the gradients of an operation's results, what the operation saved, and a setting such as its direction: the
// gradients of its inputs. These need not
// have the dtypes of the inputs: autograd converts the ones that are asked for.
using Gradients = variable_list(const variable_list& grads, const variable_list& saved, const c10::IValue& setting);

// What a node is made from besides its inputs; in one piece, because autograd takes each bare tensor for an input.
struct Record {
  variable_list results;
  variable_list saved;
  c10::IValue setting;
};

// Makes the node of an operation in the graph of autograd, after the operation was computed.
template <Gradients* gradients>
struct Differentiable : torch::autograd::Function<Differentiable<gradients>> {
  static constexpr bool is_traceable = true;  // for compiled autograd

  static variable_list forward(torch::autograd::AutogradContext* context, at::TensorList /*inputs*/, Record record) {
    context->save_for_backward(std::move(record.saved));
    context->saved_data["setting"] = record.setting;
    // One of several results may have no gradient; that of a single result is zero then.
    context->set_materialize_grads(record.results.size() == 1);
    return record.results;
  }

  static variable_list backward(torch::autograd::AutogradContext* context, const variable_list& grads) {
    variable_list results = gradients(grads, context->get_saved_variables(), context->saved_data["setting"]);
    results.emplace_back();  // for the record
    return results;
  }
};

// The results of a record, which can be differentiated for the inputs that require it.
template <Gradients* gradients>
variable_list differentiable(Record record, at::TensorList inputs) {
  for (const Tensor& input : inputs) {
    TORCH_CHECK_NOT_IMPLEMENTED(!input._fw_grad(/*level=*/0).defined(),
                                "the operations of torch.ops.grootvl_ops have no forward-mode derivatives: call the "
                                "functions of the package grootvl_ops, which have");
  }
  if (!torch::autograd::compute_requires_grad(inputs)) return std::move(record.results);
  return Differentiable<gradients>::apply(inputs, std::move(record));
}

template <Gradients* gradients>
variable_list differentiable(const variable_list& results, at::TensorList inputs, at::TensorList saved,
                             const c10::IValue& setting = {}) {
  return differentiable<gradients>(Record{results, saved.vec(), setting}, inputs);
}

template <Gradients* gradients>
Tensor differentiable(const Tensor& result, at::TensorList inputs, at::TensorList saved,
                      const c10::IValue& setting = {}) {
  return differentiable<gradients>(variable_list{result}, inputs, saved, setting)[0];
}

variable_list tree_scan_gradients(const variable_list& grads, const variable_list& saved,
                                  const c10::IValue& direction) {
  using Signature = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                               const Tensor&, const Tensor&, std::string_view);
  static const auto operation = find_operation<Signature>("grootvl_ops::tree_scan_backward");
  auto [dx, ddecay] =
      call(operation, grads[0], saved[0], saved[1], saved[2], saved[3], saved[4], direction.toStringView());
  return {dx, ddecay};
}

Tensor tree_scan(const Tensor& x, const Tensor& decay, const Tensor& parent, const Tensor& order,
                 const Tensor& subtree_size, std::string_view direction) {
  static const auto operation = find_operation<decltype(tree_scan)>("grootvl_ops::tree_scan");
  const Tensor h = call_below_autograd(operation, x, decay, parent, order, subtree_size, direction);
  return differentiable<tree_scan_gradients>(h, {x, decay}, {x, decay, parent, order, subtree_size},
                                             std::string(direction));
}

Tensor or_undefined(const std::optional<Tensor>& tensor) { return tensor ? *tensor : Tensor(); }
std::optional<Tensor> optional(const Tensor& tensor) { return tensor.defined() ? std::optional(tensor) : std::nullopt; }

const auto& selective_scan_backward() {
  using Optional = const std::optional<Tensor>&;
  using Signature = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>(
      const Tensor&, const Tensor&, const Tensor&, Optional, Optional, const Tensor&, const Tensor&, Optional,
      const Tensor&, const Tensor&, const Tensor&, std::string_view);
  static const auto operation = find_operation<Signature>("grootvl_ops::selective_scan_backward");
  return operation;
}

variable_list selective_scan_gradients(const variable_list& grads, const variable_list& saved,
                                       const c10::IValue& direction) {
  const Tensor &dt_weight = saved[2], &dt_bias = saved[3], &A_log = saved[4], &C = saved[6];
  auto [dx, ddt, ddt_weight, dparameters, dB, dC] =
      call(selective_scan_backward(), grads[0], saved[0], saved[1], optional(dt_weight), optional(dt_bias), A_log,
           saved[5], optional(C), saved[7], saved[8], saved[9], direction.toStringView());
  // Those of the inputs that there are.
  variable_list results{dx, ddt};
  if (dt_weight.defined()) results.push_back(ddt_weight);
  if (dt_bias.defined()) results.push_back(dparameters.select(0, 0));
  results.push_back(A_log.dim() == 1 ? dparameters.select(0, 1) : dparameters.slice(0, 1).t());
  results.push_back(dB);
  if (C.defined()) results.push_back(dC);
  return results;
}

Tensor selective_scan(const Tensor& x, const Tensor& dt, const std::optional<Tensor>& dt_weight,
                      const std::optional<Tensor>& dt_bias, const Tensor& A_log, const Tensor& B,
                      const std::optional<Tensor>& C, const Tensor& parent, const Tensor& order,
                      const Tensor& subtree_size, std::string_view direction) {
  static const auto operation = find_operation<decltype(selective_scan)>("grootvl_ops::selective_scan");
  const Tensor h =
      call_below_autograd(operation, x, dt, dt_weight, dt_bias, A_log, B, C, parent, order, subtree_size, direction);
  variable_list inputs{x, dt};
  if (dt_weight) inputs.push_back(*dt_weight);
  if (dt_bias) inputs.push_back(*dt_bias);
  inputs.push_back(A_log);
  inputs.push_back(B);
  if (C) inputs.push_back(*C);
  return differentiable<selective_scan_gradients>(
      h, inputs,
      {x, dt, or_undefined(dt_weight), or_undefined(dt_bias), A_log, B, or_undefined(C), parent, order, subtree_size},
      std::string(direction));
}

variable_list stepped_scan_gradients(const variable_list& grads, const variable_list& saved,
                                     const c10::IValue& direction) {
  using Signature = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>(
      const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
      const Tensor&, const Tensor&, const Tensor&, std::string_view);
  static const auto operation = find_operation<Signature>("grootvl_ops::stepped_scan_backward");
  auto [dx, ddt, ddecay_dt, dA_log, dB, dC] =
      call(operation, grads[0], saved[0], saved[1], saved[2], saved[3], saved[4], saved[5], saved[6], saved[7],
           saved[8], direction.toStringView());
  return {dx, ddt, ddecay_dt, dA_log, dB, dC};
}

Tensor stepped_scan(const Tensor& x, const Tensor& dt, const Tensor& decay_dt, const Tensor& A_log, const Tensor& B,
                    const Tensor& C, const Tensor& parent, const Tensor& order, const Tensor& subtree_size,
                    std::string_view direction) {
  static const auto operation = find_operation<decltype(stepped_scan)>("grootvl_ops::stepped_scan");
  const Tensor y = call_below_autograd(operation, x, dt, decay_dt, A_log, B, C, parent, order, subtree_size, direction);
  return differentiable<stepped_scan_gradients>(y, {x, dt, decay_dt, A_log, B, C},
                                                {x, dt, decay_dt, A_log, B, C, parent, order, subtree_size},
                                                std::string(direction));
}

variable_list merged_scan_gradients(const variable_list& grads, const variable_list& saved,
                                    const c10::IValue& direction) {
  using Optional = const std::optional<Tensor>&;
  using Signature = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>(
      const Tensor&, const Tensor&, const Tensor&, const Tensor&, Optional, const Tensor&, const Tensor&, const Tensor&,
      Optional, const Tensor&, const Tensor&, const Tensor&, const Tensor&, std::string_view);
  static const auto operation = find_operation<Signature>("grootvl_ops::merged_scan_backward");
  const Tensor &dt_bias = saved[3], &D_skip = saved[7];
  auto [dx, ddt, ddt_weight, dparameters, dB, dC] =
      call(operation, grads[0], saved[0], saved[1], saved[2], optional(dt_bias), saved[4], saved[5], saved[6],
           optional(D_skip), saved[8], saved[9], saved[10], saved[11], direction.toStringView());
  // Those of the inputs that there are.
  variable_list results{dx, ddt, ddt_weight};
  if (dt_bias.defined()) results.push_back(dparameters.select(0, 0));
  results.push_back(dparameters.select(0, 1));
  results.push_back(dB);
  results.push_back(dC);
  if (D_skip.defined()) results.push_back(dparameters.select(0, 2).select(0, 0));
  return results;
}

std::tuple<Tensor, Tensor> merged_scan(const Tensor& x, const Tensor& dt, const Tensor& dt_weight,
                                       const std::optional<Tensor>& dt_bias, const Tensor& A_log, const Tensor& B,
                                       const Tensor& C, const std::optional<Tensor>& D_skip, const Tensor& parent,
                                       const Tensor& order, const Tensor& subtree_size, std::string_view direction,
                                       std::optional<at::ScalarType> dtype, bool keep) {
  static const auto operation = find_operation<decltype(merged_scan)>("grootvl_ops::merged_scan");
  const auto [y, kept] = call_below_autograd(operation, x, dt, dt_weight, dt_bias, A_log, B, C, D_skip, parent, order,
                                             subtree_size, direction, dtype, keep);
  variable_list inputs{x, dt, dt_weight};
  if (dt_bias) inputs.push_back(*dt_bias);
  inputs.insert(inputs.end(), {A_log, B, C});
  if (D_skip) inputs.push_back(*D_skip);
  TORCH_CHECK_VALUE(keep || !torch::autograd::compute_requires_grad(inputs),
                    "merged_scan must be called with keep=True to be differentiated");
  return {differentiable<merged_scan_gradients>(y, inputs,
                                                {x, dt, dt_weight, or_undefined(dt_bias), A_log, B, C,
                                                 or_undefined(D_skip), parent, order, subtree_size, kept},
                                                std::string(direction)),
          kept};
}

// The gradient of a weight (D, 1, 3, 3) in the strides of the weight: channels last has another one for the dimension
// of size one, and DistributedDataParallel warns where the strides of a gradient are not those of its weight.
Tensor with_strides_of(const Tensor& weight, const Tensor& grad) {
  const bool same = grad.sym_strides() == weight.sym_strides() || !weight.is_contiguous();
  return same ? grad : grad.as_strided_symint(weight.sym_sizes(), weight.sym_strides());
}

// The arguments after the tensors: height and dilation.
variable_list depthwise_conv_silu_gradients(const variable_list& grads, const variable_list& saved,
                                            const c10::IValue& arguments) {
  using Signature = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, c10::SymInt, int64_t);
  static const auto operation = find_operation<Signature>("grootvl_ops::depthwise_conv_silu_backward");
  const auto& elements = arguments.toTupleRef().elements();
  const Tensor dbefore = at::silu_backward(grads[0], saved[2]);  // which a compiler fuses with what gives the gradient
  auto [dx, dweight] = call(operation, dbefore, saved[0], saved[1], elements[0].toSymInt(), elements[1].toInt());
  return {dx, with_strides_of(saved[1], dweight)};
}

std::tuple<Tensor, Tensor> depthwise_conv_silu(const Tensor& x, const Tensor& weight, c10::SymInt height,
                                               int64_t dilation, bool keep) {
  static const auto operation = find_operation<decltype(depthwise_conv_silu)>("grootvl_ops::depthwise_conv_silu");
  const auto [out, before] = call_below_autograd(operation, x, weight, height, dilation, keep);
  TORCH_CHECK_VALUE(keep || !torch::autograd::compute_requires_grad(variable_list{x, weight}),
                    "depthwise_conv_silu must be called with keep=True to be differentiated");
  return {differentiable<depthwise_conv_silu_gradients>(out, {x, weight}, {x, weight, before},
                                                        c10::ivalue::Tuple::create(height, dilation)),
          before};
}

// A node that raises when a gradient reaches it. PyTorch 2.13 changed how nodes are owned.
torch::autograd::Edge refuse(const std::string& reason, const variable_list& inputs) {
  auto edges = torch::autograd::collect_next_edges(inputs);
#if TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR < 13
  std::shared_ptr<torch::autograd::Node> node(new torch::autograd::Error(reason, std::move(edges)),
                                              torch::autograd::deleteNode);
#else
  auto node = c10::make_intrusive<torch::autograd::Error>(reason, std::move(edges));
#endif
  return {node, 0};
}

// What is said where second derivatives of an operation are asked for.
std::string once_only(const std::string& name) {
  return "grootvl_ops." + name + " can be differentiated once only: it has no second derivatives";
}

// The gradients of a backward pass, which raise when they are differentiated themselves. For nodes that compute them
// below autograd, from several operations.
variable_list refusing_derivatives(const char* name, const variable_list& grads, variable_list results) {
  if (!at::GradMode::is_enabled()) return results;
  const auto refusal = refuse(once_only(name), grads);
  for (const Tensor& result : results) {
    if (result.defined()) torch::autograd::set_history(result, refusal.function);
  }
  return results;
}

// PyTorch's operations under it compute in the dtypes that they are given, also where autocast is active.
using WithoutAutocast = c10::impl::ExcludeDispatchKeyGuard;
const c10::DispatchKeySet kAutocast = c10::autocast_dispatch_keyset;

// Not Tensor::to, which may not be called below autograd, since it can return its argument.
Tensor as_type(const Tensor& tensor, at::ScalarType type) {
  return tensor.scalar_type() == type ? tensor : at::_to_copy(tensor, tensor.options().dtype(type));
}

// A weight with so many rows and columns: what a product reads has further ones, of zeros; the gradient of such a
// weight loses them again.
struct Weight {
  explicit Weight(const Tensor& tensor) : Weight(tensor, tensor.dim() == 1 ? 1 : tensor.size(0), tensor.size(-1)) {}
  Weight(const Tensor& tensor, int64_t rows, int64_t columns)
      : tensor(tensor),
        rows(rows),
        columns(columns),
        resized(columns != tensor.size(-1) || (tensor.dim() == 2 && rows != tensor.size(0))) {}

  Tensor tensor;
  int64_t rows, columns;
  bool resized;  // it has not the sizes of the tensor
};

// Whether operations on a tensor run on a GPU at once, and nothing traces them.
bool runs_on_gpu(const Tensor& tensor) {
  return tensor.is_cuda() && !tensor.key_set().has(c10::DispatchKey::Python) &&
         !c10::impl::TorchDispatchModeTLS::any_modes_set();
}

// For the results of casts, in one allocation: many take the host longer than the launch.
std::vector<Tensor> empty_weights(at::ArrayRef<Weight> weights, at::ScalarType type) {
  constexpr int64_t kAlignment = 64;  // values
  std::vector<int64_t> first;
  int64_t all = 0;
  for (const Weight& weight : weights) {
    first.push_back(all);
    all += (weight.rows * weight.columns + kAlignment - 1) / kAlignment * kAlignment;
  }
  const Tensor memory = at::empty({all}, weights[0].tensor.options().dtype(type));
  std::vector<Tensor> results;
  for (size_t i = 0; i < weights.size(); ++i) {
    const int64_t sizes[] = {weights[i].rows, weights[i].columns}, strides[] = {weights[i].columns, 1};
    const size_t skipped = weights[i].tensor.dim() == 1;
    results.push_back(at::native::as_strided_tensorimpl(memory, at::IntArrayRef(sizes).slice(skipped),
                                                        at::IntArrayRef(strides).slice(skipped), first[i]));
  }
  return results;
}

// The casts of a GPU into `results`; if `beside` the kernels of another stream, by few blocks.
void cast_weights_into(at::TensorList results, at::ArrayRef<Weight> weights, bool beside) {
  static const auto operation =
      find_operation<void(at::TensorList, at::TensorList, bool)>("grootvl_ops::cast_weights_into");
  std::vector<Tensor> tensors;
  for (const Weight& weight : weights) tensors.push_back(weight.tensor);
  call(operation, results, at::TensorList(tensors), beside);
}

// Weights in the type of their products. On a GPU one kernel converts all of them that have one type.
std::vector<Tensor> cast_weights(const std::vector<Weight>& weights, at::ScalarType type) {
  using Signature = std::vector<Tensor>(at::TensorList, at::IntArrayRef, at::IntArrayRef, at::ScalarType);
  static const auto operation = find_operation<Signature>("grootvl_ops::cast_weights");
  std::vector<Tensor> results(weights.size());
  for (size_t first = 0; first < weights.size(); ++first) {
    if (results[first].defined()) continue;
    const Weight& weight = weights[first];
    if (!weight.resized && weight.tensor.scalar_type() == type) {
      results[first] = weight.tensor;
      continue;
    }
    std::vector<Weight> of_one_type;
    std::vector<size_t> places;
    for (size_t i = first; i < weights.size(); ++i) {
      const Weight& other = weights[i];
      const at::ScalarType other_type = other.tensor.scalar_type();
      if (other_type != weight.tensor.scalar_type() || (other_type == type && !other.resized)) continue;
      of_one_type.push_back(other);
      places.push_back(i);
    }
    std::vector<Tensor> cast;
    if (runs_on_gpu(weight.tensor)) {
      cast = empty_weights(of_one_type, type);
      cast_weights_into(cast, of_one_type, /*beside=*/false);
    } else {
      std::vector<Tensor> tensors;
      std::vector<int64_t> rows, columns;
      for (const Weight& other : of_one_type) {
        tensors.push_back(other.tensor);
        rows.push_back(other.rows);
        columns.push_back(other.columns);
      }
      cast = call(operation, at::TensorList(tensors), at::IntArrayRef(rows), at::IntArrayRef(columns), type);
    }
    for (size_t i = 0; i < places.size(); ++i) results[places[i]] = std::move(cast[i]);
  }
  return results;
}

// Weights that a GPU converts on a stream of its own, beside the kernels of the current one, in parts that the current
// stream waits for one after another. For few pixels, most of its kernels leave the memory idle, and a conversion is
// limited by memory.
class WeightsBeside {
 public:
  explicit WeightsBeside(const Tensor& like)
      : streams_(like.device().type()),
        main_(streams_.getStream(like.device())),
        other_(streams_.getStreamFromGlobalPool(like.device())) {
    c10::Event now(main_.device_type());
    now.record(main_);
    now.block(other_);
  }
  WeightsBeside(const WeightsBeside&) = delete;
  WeightsBeside& operator=(const WeightsBeside&) = delete;
  // The results are in memory of the current stream, which has to wait before it uses this memory again.
  ~WeightsBeside() {
    while (!parts_.empty()) await();
  }

  void convert(at::ArrayRef<Weight> weights, at::ScalarType type) {
    Part part{empty_weights(weights, type), c10::Event(main_.device_type())};
    {
      const c10::StreamGuard guard(other_);
      cast_weights_into(part.results, weights, /*beside=*/true);
    }
    part.done.record(other_);
    parts_.push_back(std::move(part));
  }

  // Lets the current stream wait for the next part.
  std::vector<Tensor> await() {
    Part part = std::move(parts_.front());
    parts_.pop_front();
    part.done.block(main_);
    return std::move(part.results);
  }

 private:
  struct Part {
    std::vector<Tensor> results;
    c10::Event done;
  };
  c10::impl::VirtualGuardImpl streams_;
  c10::Stream main_, other_;
  std::deque<Part> parts_;
};

// (..., C) as (rows, C).
Tensor as_rows(const Tensor& maps) { return maps.dim() == 2 ? maps : maps.reshape_symint({-1, maps.sym_size(-1)}); }

// x weight^T + bias of (rows, K), (N, K) and (N).
Tensor product(const Tensor& x, const Tensor& weight, const Tensor& bias) { return at::addmm(bias, x, weight.t()); }

// The first product of an MLP and its GELU, in half precision on a GPU from the epilogue of the product.
Tensor gelu_of_product(const Tensor& x, const Tensor& weight1, const Tensor& bias1) {
  if (x.is_cuda() && (x.scalar_type() == at::kHalf || x.scalar_type() == at::kBFloat16)) {
    return at::_addmm_activation(bias1, x, weight1.t(), 1, 1, /*use_gelu=*/true);
  }
  return at::gelu(product(x, weight1, bias1), "tanh");
}

// In which type products give the gradient of a weight of the type `type`, from `map`. In half precision on
// a GPU, cuBLAS writes it as float32, so that nothing has to convert it.
at::ScalarType gradient_type(const Tensor& map, at::ScalarType type) {
  const bool half = map.scalar_type() == at::kHalf || map.scalar_type() == at::kBFloat16;
  return map.is_cuda() && half && type == at::kFloat ? type : map.scalar_type();
}

// The gradient of a weight of the type `type`, (N, K), from that of the product, (rows, N), and its other factor,
// (rows, K).
Tensor weight_gradient(const Tensor& grad, const Tensor& x, at::ScalarType type) {
  Tensor result = at::empty({grad.size(1), x.size(1)}, x.options().dtype(gradient_type(x, type)));
  if (result.scalar_type() == x.scalar_type()) {
    at::mm_out(result, grad.t(), x);
  } else {
    at::mm_out(result, grad.t(), x, result.scalar_type());
  }
  return result;
}

// The setting: whether one operation computes products and GELU, as in compiled graphs, the type of the parameters, and
// which gradients of weights are needed.
variable_list gelu_mlp_gradients(const variable_list& grads, const variable_list& saved, const c10::IValue& setting) {
  using Results = std::tuple<Tensor, Tensor, Tensor>;
  using Fused = Results(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&);
  static const auto operation = find_operation<Results(const Tensor&, const Tensor&)>("grootvl_ops::gelu_mlp_backward");
  static const auto fused = find_operation<Fused>("grootvl_ops::gelu_mlp_fused_backward");
  static const auto bias = find_operation<Tensor(const Tensor&)>("grootvl_ops::bias_backward");
  const WithoutAutocast without(kAutocast);
  const auto &maps = saved[0], &weight1 = saved[1], &bias1 = saved[2], &weight2 = saved[3];
  const auto& elements = setting.toTupleRef().elements();
  const auto type = static_cast<at::ScalarType>(elements[1].toInt());
  const bool is_fused = elements[0].toBool(), needs_weight1 = elements[2].toBool(),
             needs_weight2 = elements[3].toBool();
  variable_list results;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    const Tensor grad = as_rows(grads[0]), x = as_rows(maps);
    const auto [hidden, dbefore, dbias1] = is_fused
                                               ? call(fused, grad, x, weight1, bias1, weight2)
                                               : call(operation, at::mm(grad, weight2), product(x, weight1, bias1));
    const auto of_weight = [&](const Tensor& dproduct, const Tensor& factor) {
      // Compiled graphs convert it together with whatever else they compute of it.
      return is_fused ? at::mm(dproduct.t(), factor) : weight_gradient(dproduct, factor, type);
    };
    results = {at::mm(dbefore, weight1).view_symint(maps.sym_sizes()), needs_weight1 ? of_weight(dbefore, x) : Tensor(),
               dbias1, needs_weight2 ? of_weight(grad, hidden) : Tensor(),
               is_fused ? at::sum(grad, 0, false, dbias1.scalar_type()) : call(bias, grad)};
  }
  return refusing_derivatives("gelu_mlp", grads, std::move(results));
}

// `cast`: weights and biases in the type of x.
Record record_gelu_mlp(const Tensor& x, const Tensor& weight1, const Tensor& bias1, const Tensor& weight2,
                       const Tensor* cast, bool fused) {
  at::AutoDispatchBelowADInplaceOrView guard;
  const Tensor out =
      product(gelu_of_product(as_rows(x), cast[0], cast[1]), cast[2], cast[3]).view_symint(x.sym_sizes());
  return {{out},
          {x, cast[0], fused ? bias1 : cast[1], cast[2]},
          c10::ivalue::Tuple::create(fused, static_cast<int64_t>(bias1.scalar_type()), weight1.requires_grad(),
                                     weight2.requires_grad())};
}

Tensor gelu_mlp(const Tensor& x, const Tensor& weight1, const Tensor& bias1, const Tensor& weight2, const Tensor& bias2,
                bool fused) {
  const WithoutAutocast without(kAutocast);
  const at::ScalarType type = x.scalar_type();
  std::vector<Tensor> cast;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    // A compiled graph converts them together with whatever else it computes.
    if (fused) {
      cast = {as_type(weight1, type), as_type(bias1, type), as_type(weight2, type), as_type(bias2, type)};
    } else {
      cast = cast_weights({Weight(weight1), Weight(bias1), Weight(weight2), Weight(bias2)}, type);
    }
  }
  return differentiable<gelu_mlp_gradients>(record_gelu_mlp(x, weight1, bias1, weight2, cast.data(), fused),
                                            {x, weight1, bias1, weight2, bias2})[0];
}

variable_list gated_norm_gradients(const variable_list& grads, const variable_list& saved, const c10::IValue&) {
  using Signature = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>(
      const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
      const Tensor&, const Tensor&, const Tensor&, const Tensor&);
  static const auto operation = find_operation<Signature>("grootvl_ops::gated_norm_backward");
  auto [dh, dx, dz, dC, dparameters] = call(operation, grads[0], saved[0], saved[1], saved[2], saved[3], saved[4],
                                            saved[5], saved[6], saved[7], saved[8], saved[9]);
  const variable_list rows = dparameters.unbind();  // D_skip, then weight and bias of both norms
  return {dh, dx, dz, dC, rows[0], rows[1], rows[2], rows[3], rows[4]};
}

std::tuple<Tensor, Tensor> gated_norm(const Tensor& h, const Tensor& x, const Tensor& z, const Tensor& C,
                                      const Tensor& D_skip, const Tensor& h_weight, const Tensor& h_bias,
                                      const Tensor& out_weight, const Tensor& out_bias, double eps) {
  static const auto operation = find_operation<decltype(gated_norm)>("grootvl_ops::gated_norm");
  const auto [out, statistics] =
      call_below_autograd(operation, h, x, z, C, D_skip, h_weight, h_bias, out_weight, out_bias, eps);
  return {
      differentiable<gated_norm_gradients>(out, {h, x, z, C, D_skip, h_weight, h_bias, out_weight, out_bias},
                                           {h, x, z, C, D_skip, h_weight, h_bias, out_weight, out_bias, statistics}),
      statistics};
}

// The part of a mixer before the choice of its trees: a product, and the convolution of its first half.
// The arguments after the tensors: height, dilation, the type of the weight, and whether gradients of x and of the
// weight are needed.
//
// The gradients, below autograd. The gradient of the features is dfeatures + more. dboth, of which the second half is
// the gradient of z, gets the one of the first half, so that one product each gives the gradients of x and of the
// weight.
variable_list input_gradients(const Tensor& dfeatures, const std::optional<Tensor>& more, const Tensor& dboth,
                              const variable_list& saved, const c10::IValue& arguments) {
  using Signature = Tensor(const Tensor&, const Tensor&, const std::optional<Tensor>&, const Tensor&, const Tensor&,
                           const Tensor&, c10::SymInt, int64_t);
  static const auto convolution = find_operation<Signature>("grootvl_ops::depthwise_conv_silu_backward_into");
  const auto &x = saved[0], &in_proj = saved[1], &conv_weight = saved[2], &both = saved[3], &before = saved[4];
  const auto& elements = arguments.toTupleRef().elements();
  const int64_t D = conv_weight.size(0);
  const Tensor dconv_weight = call(convolution, dboth.narrow(2, 0, D), dfeatures, more, before, both.narrow(2, 0, D),
                                   conv_weight, elements[0].toSymInt(), elements[1].toInt());
  const Tensor rows = as_rows(dboth);
  const auto type = static_cast<at::ScalarType>(elements[2].toInt());
  return {elements[3].toBool() ? at::mm(rows, in_proj).view(x.sizes()) : Tensor(),
          elements[4].toBool() ? weight_gradient(rows, as_rows(x), type) : Tensor(),
          with_strides_of(conv_weight, dconv_weight)};
}

variable_list mixer_input_gradients(const variable_list& grads, const variable_list& saved,
                                    const c10::IValue& arguments) {
  const WithoutAutocast without(kAutocast);
  const auto &both = saved[3], &before = saved[4];
  variable_list results;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    const int64_t D = before.size(2);
    const Tensor dboth = at::empty(both.sizes(), both.options());
    Tensor dz = dboth.narrow(2, D, D);
    if (grads[1].defined()) {
      dz.copy_(grads[1]);
    } else {
      dz.zero_();
    }
    results =
        input_gradients(grads[0].defined() ? grads[0] : at::zeros_like(before), std::nullopt, dboth, saved, arguments);
  }
  return refusing_derivatives("mixer_input", grads, std::move(results));
}

// `of_product`: in_proj in the type of x. `keep`: whether there will be a backward pass.
Record record_mixer_input(const Tensor& x, const Tensor& in_proj, const Tensor& of_product, const Tensor& conv_weight,
                          int64_t dilation, bool keep) {
  static const auto convolution = find_operation<decltype(depthwise_conv_silu)>("grootvl_ops::depthwise_conv_silu");
  at::AutoDispatchBelowADInplaceOrView guard;
  const int64_t height = x.size(1), D = conv_weight.size(0);
  const Tensor both = at::mm(as_rows(x), of_product.t()).view({x.size(0), height * x.size(2), 2 * D});
  const auto [features, before] =
      call(convolution, both.narrow(2, 0, D), conv_weight, c10::SymInt(height), dilation, keep);
  return {{features, both.narrow(2, D, D)},
          {x, of_product, conv_weight, both, before},
          c10::ivalue::Tuple::create(height, dilation, static_cast<int64_t>(in_proj.scalar_type()), x.requires_grad(),
                                     in_proj.requires_grad())};
}

std::tuple<Tensor, Tensor> mixer_input(const Tensor& x, const Tensor& in_proj, const Tensor& conv_weight,
                                       int64_t dilation) {
  const WithoutAutocast without(kAutocast);
  TORCH_CHECK_VALUE(x.dim() == 4, "x must be (B, H, W, C), got ", x.sizes());
  const variable_list inputs{x, in_proj, conv_weight};
  Tensor of_product;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    of_product = cast_weights({Weight(in_proj)}, x.scalar_type())[0];
  }
  const variable_list results = differentiable<mixer_input_gradients>(
      record_mixer_input(x, in_proj, of_product, conv_weight, dilation, torch::autograd::compute_requires_grad(inputs)),
      inputs);
  return {results[0], results[1]};
}

// The part of a mixer after the choice of its tree: step size, B and C by a product, scan, gated norm, and a product.
// cuBLAS has its fast kernels for matrices whose rows begin at multiples of 16 bytes. So x_proj is followed by rows of
// zeros, and dt_weight by columns of zeros: the step size is a product with all that x_proj gives, B and C times zero.
// The arguments after the tensors: direction, the types of the weights of both products, and whether their gradients
// are needed.
//
// The gradients, below autograd. The gradient of z is written into dz. The one of x is the sum of the first two
// results.
variable_list output_gradients(const Tensor& grad_, const Tensor& dz, const variable_list& saved,
                               const c10::IValue& arguments) {
  using Signature = std::tuple<Tensor, Tensor, Tensor, Tensor>(
      const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
      const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&);
  static const auto norm = find_operation<Signature>("grootvl_ops::gated_norm_backward_into");
  const auto &x = saved[0], &z = saved[1], &x_proj = saved[2], &dt_weight = saved[3], &dt_bias = saved[4],
             &A_log = saved[5], &D_skip = saved[6], &h_weight = saved[7], &h_bias = saved[8], &out_weight = saved[9],
             &out_bias = saved[10], &out_proj = saved[11], &projected = saved[12], &h = saved[13], &y = saved[14];
  const auto& elements = arguments.toTupleRef().elements();
  const auto type = [&](int i) { return static_cast<at::ScalarType>(elements[i].toInt()); };
  const int64_t D = x.size(2), rank = elements[5].toInt();
  const Tensor grad = as_rows(grad_), rows = as_rows(x);
  const Tensor B = projected.select(2, rank), C = projected.select(2, rank + 1);
  const auto [dh, dskip, dC, dnorms] = call(norm, dz, at::mm(grad, out_proj).view(x.sizes()), h, x, z, C, D_skip,
                                            h_weight, h_bias, out_weight, out_bias, saved[15]);
  const auto [dscan, dproducts, ddt_weight, dparameters, dB, none] =
      call(selective_scan_backward(), dh, x, projected, std::optional(dt_weight), std::optional(dt_bias), A_log, B,
           std::optional<Tensor>(), saved[16], saved[17], saved[18], elements[0].toStringView());
  Tensor of_weights = dproducts.narrow(2, rank, 2);  // where the step size has gradients of zero
  at::stack_out(of_weights, {dB, dC}, 2);
  const Tensor dprojected = as_rows(dproducts);
  Tensor dx = dskip.view({-1, D});
  dx = dx.addmm_(dprojected, x_proj).view(x.sizes());
  const variable_list of_scan = dparameters.unbind();  // dt_bias, A_log
  const variable_list of_norms = dnorms.unbind();      // D_skip, then weight and bias of both norms
  return {dx,
          dscan,
          elements[3].toBool() ? weight_gradient(dprojected, rows, type(1)).narrow(0, 0, rank + 2) : Tensor(),
          cast_weights({Weight(ddt_weight, D, rank)}, type(1))[0],
          of_scan[0],
          of_scan[1],
          of_norms[0],
          of_norms[1],
          of_norms[2],
          of_norms[3],
          of_norms[4],
          elements[4].toBool() ? weight_gradient(grad, as_rows(y), type(2)) : Tensor()};
}

variable_list mixer_output_gradients(const variable_list& grads, const variable_list& saved,
                                     const c10::IValue& arguments) {
  const WithoutAutocast without(kAutocast);
  variable_list results;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    const Tensor dz = at::empty(saved[1].sizes(), saved[1].options());
    results = output_gradients(grads[0], dz, saved, arguments);
    results[0].add_(results[1]);
    results[1] = dz;
  }
  return refusing_derivatives("mixer_output", grads, std::move(results));
}

// The parameters of `mixer_output`, in its order.
struct OutputParameters {
  const Tensor &x_proj, &dt_weight, &dt_bias, &A_log, &D_skip, &h_weight, &h_bias, &out_weight, &out_bias, &out_proj;

  int64_t rank() const { return dt_weight.size(1); }

  // The other sizes are checked by the operations that take them.
  void check(const Tensor& x, const Tensor& z) const {
    const auto check_device = [&](const char* name, const Tensor& tensor) {
      TORCH_CHECK_VALUE(tensor.device() == x.device(), name, " must be on the device of its map, got ", tensor.device(),
                        " and ", x.device());
    };
    const auto check_weight = [&](const char* name, const Tensor& weight, at::IntArrayRef size) {
      TORCH_CHECK_VALUE(weight.sizes() == size, name, " must be ", size, ", got ", weight.sizes());
      TORCH_CHECK_TYPE(weight.is_floating_point(), name, " must be floating point, got ", weight.scalar_type());
      check_device(name, weight);
    };
    TORCH_CHECK_VALUE(x.dim() == 3 && out_proj.dim() == 2, "x must be (B, L, D) and out_proj (C, D), got ", x.sizes(),
                      " and ", out_proj.sizes());
    const int64_t rank = dt_weight.dim() == 2 ? dt_weight.size(1) : 0;
    check_weight("x_proj", x_proj, {rank + 2, x.size(2)});
    check_weight("dt_weight", dt_weight, {x.size(2), rank});
    check_weight("out_proj", out_proj, {out_proj.size(0), x.size(2)});
    check_device("z", z);
    check_device("dt_bias", dt_bias);
    check_device("A_log", A_log);
    check_device("D_skip", D_skip);
    check_device("h_weight", h_weight);
    check_device("h_bias", h_bias);
    check_device("out_weight", out_weight);
    check_device("out_bias", out_bias);
  }

  // As the products read them.
  Weight padded_x() const { return {x_proj, padded_rank(), x_proj.size(1)}; }
  Weight padded_dt() const { return {dt_weight, dt_weight.size(0), padded_rank()}; }
  int64_t padded_rank() const { return (rank() + 2 + 7) / 8 * 8; }

  // dt_weight as the scan of x reads it, from what it was converted to. On a CPU the step size is not rounded.
  Tensor step_weight(const Tensor& cast, const Tensor& x) const {
    const at::ScalarType type = dt_weight.scalar_type();
    return x.is_cuda() || cast.scalar_type() == type ? cast : cast_weights({padded_dt()}, type)[0];
  }
};

// `cast`: x_proj, dt_weight and out_proj as the products read them.
Record record_mixer_output(const Tensor& x, const Tensor& z, const OutputParameters& of, const Tensor* cast,
                           const Tensor& parent, const Tensor& order, const Tensor& subtree_size, double eps,
                           std::string_view direction) {
  static const auto scan = find_operation<decltype(selective_scan)>("grootvl_ops::selective_scan");
  static const auto norm = find_operation<decltype(gated_norm)>("grootvl_ops::gated_norm");
  at::AutoDispatchBelowADInplaceOrView guard;
  const Tensor &of_x = cast[0], &of_dt = cast[1], &of_out = cast[2];
  const int64_t rank = of.rank();
  const Tensor projected = at::mm(as_rows(x), of_x.t()).view({x.size(0), x.size(1), of_x.size(0)});
  const Tensor h = call(scan, x, projected, std::optional(of_dt), std::optional(of.dt_bias), of.A_log,
                        projected.select(2, rank), std::optional<Tensor>(), parent, order, subtree_size, direction);
  const auto [y, statistics] = call(norm, h, x, z, projected.select(2, rank + 1), of.D_skip, of.h_weight, of.h_bias,
                                    of.out_weight, of.out_bias, eps);
  const Tensor out = at::mm(as_rows(y), of_out.t()).view({x.size(0), x.size(1), of_out.size(0)});
  return {{out},
          {x, z, of_x, of_dt, of.dt_bias, of.A_log, of.D_skip, of.h_weight, of.h_bias, of.out_weight, of.out_bias,
           of_out, projected, h, y, statistics, parent, order, subtree_size},
          c10::ivalue::Tuple::create(std::string(direction), static_cast<int64_t>(of.x_proj.scalar_type()),
                                     static_cast<int64_t>(of.out_proj.scalar_type()), of.x_proj.requires_grad(),
                                     of.out_proj.requires_grad(), rank)};
}

Tensor mixer_output(const Tensor& x, const Tensor& z, const Tensor& x_proj, const Tensor& dt_weight,
                    const Tensor& dt_bias, const Tensor& A_log, const Tensor& D_skip, const Tensor& h_weight,
                    const Tensor& h_bias, const Tensor& out_weight, const Tensor& out_bias, const Tensor& out_proj,
                    const Tensor& parent, const Tensor& order, const Tensor& subtree_size, double eps,
                    std::string_view direction) {
  const WithoutAutocast without(kAutocast);
  const OutputParameters of{x_proj,   dt_weight, dt_bias,    A_log,    D_skip,
                            h_weight, h_bias,    out_weight, out_bias, out_proj};
  of.check(x, z);
  std::vector<Tensor> cast;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    cast = cast_weights({of.padded_x(), of.padded_dt(), Weight(out_proj)}, x.scalar_type());
    cast[1] = of.step_weight(cast[1], x);
  }
  return differentiable<mixer_output_gradients>(
      record_mixer_output(x, z, of, cast.data(), parent, order, subtree_size, eps, direction),
      {x, z, x_proj, dt_weight, dt_bias, A_log, D_skip, h_weight, h_bias, out_weight, out_bias, out_proj})[0];
}

variable_list layer_norm_gradients(const variable_list& grads, const variable_list& saved, const c10::IValue&) {
  using Signature = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&);
  static const auto operation = find_operation<Signature>("grootvl_ops::layer_norm_backward");
  auto [dx, dparameters] = call(operation, grads[0], saved[0], saved[1], saved[2]);
  const variable_list rows = dparameters.unbind();  // weight, bias
  return {dx, rows[0], rows[1]};
}

std::tuple<Tensor, Tensor> layer_norm(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps,
                                      std::optional<at::ScalarType> dtype) {
  static const auto operation = find_operation<decltype(layer_norm)>("grootvl_ops::layer_norm");
  const auto [out, statistics] = call_below_autograd(operation, x, weight, bias, eps, dtype);
  return {differentiable<layer_norm_gradients>(out, {x, weight, bias}, {x, weight, statistics}), statistics};
}

variable_list add_layer_norm_gradients(const variable_list& grads, const variable_list& saved,
                                       const c10::IValue& branch_type) {
  using Signature =
      std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const std::optional<Tensor>&, const Tensor&, const Tensor&,
                                         const Tensor&, const std::optional<Tensor>&, at::ScalarType);
  static const auto operation = find_operation<Signature>("grootvl_ops::add_layer_norm_backward");
  const Tensor& sum = saved[0];
  const Tensor grad = grads[1].defined() ? grads[1] : at::zeros_like(sum);
  const auto type = static_cast<at::ScalarType>(branch_type.toInt());
  auto [dx, dbranch, dparameters] =
      call(operation, grad, optional(grads[0]), sum, saved[1], saved[2], optional(saved[3]), type);
  const variable_list rows = dparameters.unbind();  // weight, bias
  // Not told by the sizes, which a compiler would then take for constants.
  const bool shared = type == sum.scalar_type() && !saved[3].defined();
  return {dx, shared ? dx : dbranch, rows[0], rows[1]};
}

Record record_add_layer_norm(const Tensor& x, const Tensor& branch, const Tensor& weight, const Tensor& bias,
                             double eps, std::optional<at::ScalarType> dtype, const std::optional<Tensor>& factors) {
  using Signature =
      std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&, double,
                                         std::optional<at::ScalarType>, const std::optional<Tensor>&);
  static const auto operation = find_operation<Signature>("grootvl_ops::add_layer_norm");
  const auto [sum, normed, statistics] = call_below_autograd(operation, x, branch, weight, bias, eps, dtype, factors);
  return {{sum, normed},
          {sum, weight, statistics, factors ? *factors : Tensor()},
          static_cast<int64_t>(branch.scalar_type())};
}

std::tuple<Tensor, Tensor, Tensor> add_layer_norm(const Tensor& x, const Tensor& branch, const Tensor& weight,
                                                  const Tensor& bias, double eps, std::optional<at::ScalarType> dtype,
                                                  const std::optional<Tensor>& factors) {
  Record record = record_add_layer_norm(x, branch, weight, bias, eps, dtype, factors);
  const Tensor statistics = record.saved[2];
  const variable_list results = differentiable<add_layer_norm_gradients>(std::move(record), {x, branch, weight, bias});
  return {results[0], results[1], statistics};
}

// The steps of a block of `tree_blocks`, in order. Gradients are those of the operation that is a step alone, or what
// these consist of.
enum Step { kInput, kOutput, kAddMixed, kMlp, kAddMlp };

// The parameters of a block, in the order of the steps.
// clang-format off
enum Parameter {
  kInProj, kConvWeight,
  kXProj, kDtWeight, kDtBias, kALog, kDSkip, kHWeight, kHBias, kOutWeight, kOutBias, kOutProj,
  kNormWeight, kNormBias,
  kWeight1, kBias1, kWeight2, kBias2,
  kNextWeight, kNextBias,
  kParameters
};
// clang-format on

// While it lives, the GPU's kernels for the gradients of parameters leave the last step, a sum over blocks, for later.
class WaitingSums {
 public:
  explicit WaitingSums(const Tensor& like) : like_(runs_on_gpu(like) ? like : Tensor()) {
    static const auto wait = find_operation<void(const Tensor&)>("grootvl_ops::sums_wait");
    if (like_.defined()) call(wait, like_);
  }

  // Computes them, in one launch.
  void run() {
    static const auto run = find_operation<void(const Tensor&)>("grootvl_ops::sums_run");
    if (like_.defined()) call(run, std::exchange(like_, Tensor()));
  }

  ~WaitingSums() {
    if (!like_.defined()) return;
    try {
      run();
    } catch (...) {  // whoever left early has raised an error already
    }
  }

 private:
  Tensor like_;
};

// The setting: of each step, how many tensors it saved, and its setting.
variable_list tree_block_gradients(const variable_list& grads, const variable_list& saved, const c10::IValue& setting) {
  variable_list results;
  {
    const at::AutoGradMode once(false);
    const at::AutoDispatchBelowADInplaceOrView guard;
    const WithoutAutocast without(kAutocast);
    WaitingSums sums(saved[0]);
    const auto& steps = setting.toTupleRef().elements();
    auto end = saved.end();
    const auto saved_by = [&](Step step) {
      const auto begin = end - steps[2 * step].toInt();
      return variable_list(begin, std::exchange(end, begin));
    };
    const auto of_step = [&](Gradients* gradients, Step step, const variable_list& of_results) {
      return gradients(of_results, saved_by(step), steps[2 * step + 1]);
    };
    const Tensor &dx = grads[0], &dnormed = grads[1];
    const auto of_add_mlp = of_step(add_layer_norm_gradients, kAddMlp, {dx, dnormed});
    const auto of_mlp = of_step(gelu_mlp_gradients, kMlp, {of_add_mlp[1]});
    const auto of_add_mixed = of_step(add_layer_norm_gradients, kAddMixed, {of_add_mlp[0], of_mlp[0]});
    const variable_list by_output = saved_by(kOutput), by_input = saved_by(kInput);
    const Tensor& both = by_input[3];  // features before the convolution, and z
    const int64_t D = both.size(2) / 2;
    const Tensor dboth = at::empty(both.sizes(), both.options());
    const auto of_output = output_gradients(of_add_mixed[1], dboth.narrow(2, D, D), by_output, steps[2 * kOutput + 1]);
    const auto of_input = input_gradients(of_output[0], of_output[1], dboth, by_input, steps[2 * kInput + 1]);
    results = {of_add_mixed[0], of_input[0]};
    for (const auto& [all, inputs] : {std::pair(&of_input, 1), std::pair(&of_output, 2), std::pair(&of_add_mixed, 2),
                                      std::pair(&of_mlp, 1), std::pair(&of_add_mlp, 2)}) {
      results.insert(results.end(), all->begin() + inputs, all->end());
    }
    sums.run();
  }
  return refusing_derivatives("tree_blocks", grads, std::move(results));
}

// The weights of the products of all blocks as the products read them, in the type of `normed`, kCount of each block:
// of in_proj, of `mixer_output`, and of the MLP. One launch converts all of them. In inference on a GPU this is done
// beside the kernels of the first block.
class ProductWeights {
 public:
  static constexpr size_t kCount = 8;

  ProductWeights(at::TensorList parameters, const std::vector<OutputParameters>& outputs, const Tensor& normed) {
    const at::ScalarType type = normed.scalar_type();
    std::vector<Weight> weights;
    bool all_differ = !outputs.empty() && type != at::kFloat;
    for (size_t block = 0; block < outputs.size(); ++block) {
      const Tensor* p = &parameters[block * kParameters];
      const OutputParameters& of = outputs[block];
      for (const auto& weight : {Weight(p[kInProj]), of.padded_x(), of.padded_dt(), Weight(p[kOutProj]),
                                 Weight(p[kWeight1]), Weight(p[kBias1]), Weight(p[kWeight2]), Weight(p[kBias2])}) {
        all_differ &= weight.tensor.scalar_type() == at::kFloat;
        weights.push_back(weight);
      }
    }
    if (runs_on_gpu(normed) && all_differ && !at::GradMode::is_enabled()) {
      const at::ArrayRef<Weight> all(weights);
      beside_.emplace(normed);
      converted_ = cast_weights({weights[0]}, type);
      beside_->convert(all.slice(1, kCount - 1), type);
      if (all.size() > kCount) beside_->convert(all.slice(kCount), type);
      return;
    }
    converted_ = cast_weights(weights, type);
    for (size_t block = 0; block < outputs.size(); ++block) {
      Tensor& of_step = converted_[block * kCount + 2];
      of_step = outputs[block].step_weight(of_step, normed);
    }
  }

  // Those of a block from the given one on, up to the MLP's or the block's last.
  const Tensor* from(size_t block, size_t first) {
    const size_t place = block * kCount + first;
    while (place >= converted_.size()) {
      for (Tensor& weight : beside_->await()) converted_.push_back(std::move(weight));
    }
    return &converted_[place];
  }

 private:
  std::vector<Tensor> converted_;
  std::optional<WeightsBeside> beside_;
};

std::tuple<Tensor, Tensor> tree_blocks(const Tensor& x_, const Tensor& normed_, at::TensorList parameters,
                                       const std::optional<Tensor>& factors_, int64_t dilation, std::string_view metric,
                                       std::string_view direction, int64_t root, bool one_tree, double mixer_eps,
                                       double norm_eps, at::ScalarType dtype) {
  using Tree = std::tuple<Tensor, Tensor, Tensor>;
  static const auto weigh = find_operation<Tensor(const Tensor&, std::string_view)>("grootvl_ops::edge_weights");
  static const auto span =
      find_operation<Tree(const Tensor&, c10::SymInt, c10::SymInt, c10::SymInt)>("grootvl_ops::grid_tree");
  const WithoutAutocast without(kAutocast);
  TORCH_CHECK_VALUE(x_.dim() == 4 && x_.sizes() == normed_.sizes(), "x and normed must be (B, H, W, C), got ",
                    x_.sizes(), " and ", normed_.sizes());
  TORCH_CHECK_VALUE(parameters.size() % kParameters == 0, "parameters must be ", int{kParameters},
                    " of each block, got ", parameters.size());
  const size_t blocks = parameters.size() / kParameters;
  const std::array<int64_t, 2> of_factors{2 * static_cast<int64_t>(blocks), x_.size(0)};
  TORCH_CHECK_VALUE(!factors_ || factors_->sizes() == at::IntArrayRef(of_factors), "factors must be ",
                    at::IntArrayRef(of_factors), ", got ", factors_->sizes());
  const at::ScalarType type = normed_.scalar_type();
  std::vector<OutputParameters> of_outputs;
  for (size_t block = 0; block < blocks; ++block) {
    const Tensor* p = &parameters[block * kParameters];
    TORCH_CHECK_VALUE(p[kDtWeight].dim() == 2 && p[kXProj].dim() == 2, "dt_weight and x_proj must be matrices, got ",
                      p[kDtWeight].sizes(), " and ", p[kXProj].sizes());
    of_outputs.push_back({p[kXProj], p[kDtWeight], p[kDtBias], p[kALog], p[kDSkip], p[kHWeight], p[kHBias],
                          p[kOutWeight], p[kOutBias], p[kOutProj]});
  }
  std::optional<ProductWeights> products;
  variable_list factors;  // of each branch, in the type in which they multiply
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    products.emplace(parameters, of_outputs, normed_);
    if (factors_) factors = as_type(*factors_, x_.scalar_type() == at::kDouble ? at::kDouble : at::kFloat).unbind();
  }
  Tensor x = x_, normed = normed_;
  Tree tree;
  for (size_t block = 0; block < blocks; ++block) {
    const Tensor* p = &parameters[block * kParameters];
    variable_list inputs{x, normed};
    inputs.insert(inputs.end(), p, p + kParameters);
    const bool keep = torch::autograd::compute_requires_grad(inputs);
    Record all;
    std::vector<c10::IValue> settings;
    // Computes a step, and keeps what its gradients need.
    const auto take = [&](Record step) {
      if (keep) {
        settings.emplace_back(static_cast<int64_t>(step.saved.size()));
        settings.push_back(std::move(step.setting));
        all.saved.insert(all.saved.end(), step.saved.begin(), step.saved.end());
      }
      return std::move(step.results);
    };
    const auto add = [&](const Tensor& to, const Tensor& branch, Parameter weight, size_t of_block, auto of_type) {
      at::AutoDispatchBelowADInplaceOrView guard;
      return take(record_add_layer_norm(to, branch.view(to.sizes()), p[weight], p[weight + 1], norm_eps, of_type,
                                        factors_ ? std::optional(factors[2 * block + of_block]) : std::nullopt));
    };
    variable_list mixed =
        take(record_mixer_input(normed, p[kInProj], *products->from(block, 0), p[kConvWeight], dilation, keep));
    of_outputs[block].check(mixed[0], mixed[1]);
    if (block == 0 || !one_tree) {
      at::AutoDispatchBelowADInplaceOrView guard;
      const int64_t height = x.size(1), width = x.size(2);
      const Tensor weights = call(weigh, mixed[0].view({x.size(0), height, width, mixed[0].size(2)}), metric);
      tree = call(span, weights, c10::SymInt(height), c10::SymInt(width), c10::SymInt(root));
    }
    const auto& [parent, order, subtree_size] = tree;
    mixed = take(record_mixer_output(mixed[0], mixed[1], of_outputs[block], products->from(block, 1), parent, order,
                                     subtree_size, mixer_eps, direction));
    const variable_list after = add(x, mixed[0], kNormWeight, 0, type);
    const variable_list mlp =
        take(record_gelu_mlp(after[1], p[kWeight1], p[kBias1], p[kWeight2], products->from(block, 4), /*fused=*/false));
    all.results = add(after[0], mlp[0], kNextWeight, 1, block + 1 < blocks ? type : dtype);
    if (keep) all.setting = c10::ivalue::Tuple::create(std::move(settings));
    const variable_list results = differentiable<tree_block_gradients>(std::move(all), inputs);
    x = results[0], normed = results[1];
  }
  return {x, normed};
}

// Any *_backward: its results pass for differentiable, and say that they are not when that is asked of them.
void backward_once(const c10::OperatorHandle& operation, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  const auto& schema = operation.schema();
  torch::autograd::Edge refusal;
  if (at::GradMode::is_enabled()) {
    variable_list inputs;
    for (const c10::IValue& argument : torch::jit::last(*stack, schema.arguments().size())) {
      if (argument.isTensor()) inputs.push_back(argument.toTensor());
    }
    if (torch::autograd::compute_requires_grad(inputs)) {
      std::string name = schema.name().substr(schema.name().rfind(':') + 1);
      name.resize(name.rfind("_backward"));
      refusal = refuse(once_only(name), inputs);
    }
  }
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    operation.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
  }
  if (!refusal.is_valid()) return;
  for (const c10::IValue& result : torch::jit::last(*stack, schema.returns().size())) {
    torch::autograd::set_history(result.toTensor(), refusal.function);
  }
}

}  // namespace

// With gradients, for whoever asks for some: by PyTorch's operations.
std::vector<Tensor> differentiable_cast_weights(at::TensorList weights, at::IntArrayRef rows, at::IntArrayRef columns,
                                                at::ScalarType type) {
  using Signature = decltype(differentiable_cast_weights);
  static const auto operation = find_operation<Signature>("grootvl_ops::cast_weights");
  std::vector<Tensor> results = call_below_autograd(operation, weights, rows, columns, type);
  if (!torch::autograd::compute_requires_grad(weights)) return results;
  for (size_t i = 0; i < results.size(); ++i) {
    const Tensor& weight = weights[i];
    std::vector<int64_t> zeros{0, columns[i] - weight.size(-1)};
    if (weight.dim() == 2) zeros.insert(zeros.end(), {0, rows[i] - weight.size(0)});
    results[i] = at::constant_pad_nd(weight.to(type), zeros);
  }
  return results;
}

// Operations of several operations, with gradients of their own, on every device.
TORCH_LIBRARY_IMPL(grootvl_ops, CompositeImplicitAutograd, m) {
  m.impl("mixer_input", TORCH_FN(mixer_input));
  m.impl("mixer_output", TORCH_FN(mixer_output));
  m.impl("tree_blocks", TORCH_FN(tree_blocks));
}

// Where autograd is left out, as in inference mode.
TORCH_LIBRARY_IMPL(grootvl_ops, CUDA, m) { m.impl("gelu_mlp", TORCH_FN(gelu_mlp)); }

TORCH_LIBRARY_IMPL(grootvl_ops, Autograd, m) {
  m.impl("tree_scan", TORCH_FN(tree_scan));
  m.impl("selective_scan", TORCH_FN(selective_scan));
  m.impl("stepped_scan", TORCH_FN(stepped_scan));
  m.impl("merged_scan", TORCH_FN(merged_scan));
  m.impl("depthwise_conv_silu", TORCH_FN(depthwise_conv_silu));
  m.impl("gelu_mlp", TORCH_FN(gelu_mlp));
  m.impl("cast_weights", TORCH_FN(differentiable_cast_weights));
  m.impl("gated_norm", TORCH_FN(gated_norm));
  m.impl("layer_norm", TORCH_FN(layer_norm));
  m.impl("add_layer_norm", TORCH_FN(add_layer_norm));
  for (const char* name :
       {"tree_scan_backward", "selective_scan_backward", "stepped_scan_backward", "merged_scan_backward",
        "depthwise_conv_silu_backward", "gated_norm_backward", "layer_norm_backward", "add_layer_norm_backward",
        "gelu_mlp_backward", "gelu_mlp_fused_backward", "bias_backward"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&backward_once>());
  }
}

}  // namespace grootvl
