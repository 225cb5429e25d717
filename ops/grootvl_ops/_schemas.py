"""The schemas of the operations: the one place that says their names, arguments and results."""

_TREE = "Tensor parent, Tensor order, Tensor subtree_size"
_SELECTIVE = (
    "Tensor x, Tensor dt, Tensor? dt_weight, Tensor? dt_bias, Tensor A_log, Tensor B, Tensor? C, "
    f'{_TREE}, str direction="both"'
)
_MERGED = (
    f"Tensor x, Tensor dt, Tensor dt_weight, Tensor? dt_bias, Tensor A_log, Tensor B, Tensor C, Tensor? D_skip, {_TREE}"
)
_STEPPED = f"Tensor x, Tensor dt, Tensor decay_dt, Tensor A_log, Tensor B, Tensor C, {_TREE}, str direction"
_GATED_NORM = (
    "Tensor h, Tensor x, Tensor z, Tensor C, Tensor D_skip, Tensor h_weight, Tensor h_bias, "
    "Tensor out_weight, Tensor out_bias"
)

SCHEMAS = (
    "edge_weights(Tensor features, str metric) -> Tensor",
    "neighbour_cosines(Tensor x, int neighbours) -> Tensor",
    "grid_tree(Tensor weights, SymInt height, SymInt width, SymInt root) -> (Tensor, Tensor, Tensor)",
    "graph_tree(Tensor edges, Tensor weights, SymInt num_vertices, SymInt root) -> (Tensor, Tensor, Tensor)",
    "path_tree(Tensor order) -> (Tensor, Tensor, Tensor)",
    f'tree_scan(Tensor x, Tensor decay, {_TREE}, str direction="both") -> Tensor',
    f'tree_scan_backward(Tensor grad, Tensor x, Tensor decay, {_TREE}, str direction="both") -> (Tensor, Tensor)',
    f"selective_scan({_SELECTIVE}) -> Tensor",
    f"selective_scan_backward(Tensor grad, {_SELECTIVE}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    f"stepped_scan({_STEPPED}) -> Tensor",
    f"stepped_scan_backward(Tensor grad, {_STEPPED}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    f"merged_scan({_MERGED}, str direction, ScalarType? dtype=None, bool keep=False) -> (Tensor, Tensor)",
    f"merged_scan_backward(Tensor grad, {_MERGED}, Tensor kept, str direction) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "mixer_input(Tensor x, Tensor in_proj, Tensor conv_weight, int dilation) -> (Tensor, Tensor)",
    "mixer_output(Tensor x, Tensor z, Tensor x_proj, Tensor dt_weight, Tensor dt_bias, Tensor A_log, Tensor D_skip, "
    f"Tensor h_weight, Tensor h_bias, Tensor out_weight, Tensor out_bias, Tensor out_proj, {_TREE}, float eps, "
    "str direction) -> Tensor",
    "tree_blocks(Tensor x, Tensor normed, Tensor[] parameters, Tensor? factors, int dilation, str metric, "
    "str direction, int root, bool one_tree, float mixer_eps, float norm_eps, ScalarType dtype) -> (Tensor, Tensor)",
    "gelu_mlp(Tensor x, Tensor weight1, Tensor bias1, Tensor weight2, Tensor bias2, bool fused) -> Tensor",
    "cast_weights(Tensor[] weights, int[] rows, int[] columns, ScalarType dtype) -> Tensor[]",
    "cast_weights_into(Tensor(a!)[] results, Tensor[] weights, bool beside) -> ()",
    "bias_backward(Tensor grad) -> Tensor",
    # For the gradients of several operations: on which GPU, see csrc/cuda/common/sum.cuh.
    "sums_wait(Tensor like) -> ()",
    "sums_run(Tensor like) -> ()",
    "gelu_mlp_backward(Tensor dhidden, Tensor before) -> (Tensor, Tensor, Tensor)",
    "gelu_mlp_fused_backward(Tensor grad, Tensor x, Tensor weight1, Tensor bias1, Tensor weight2) "
    "-> (Tensor, Tensor, Tensor)",
    "depthwise_conv_silu(Tensor x, Tensor weight, SymInt height, int dilation, bool keep=False) -> (Tensor, Tensor)",
    "depthwise_conv_silu_backward(Tensor grad, Tensor x, Tensor weight, SymInt height, int dilation) "
    "-> (Tensor, Tensor)",
    # Into a part of a larger map; from the gradient grad + more of what SiLU gives.
    "depthwise_conv_silu_backward_into(Tensor(a!) dx, Tensor grad, Tensor? more, Tensor before, Tensor x, "
    "Tensor weight, SymInt height, int dilation) -> Tensor",
    f"gated_norm({_GATED_NORM}, float eps) -> (Tensor, Tensor)",
    f"gated_norm_backward(Tensor grad, {_GATED_NORM}, Tensor statistics) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    f"gated_norm_backward_into(Tensor(a!) dz, Tensor grad, {_GATED_NORM}, Tensor statistics) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    "add_layer_norm(Tensor x, Tensor branch, Tensor weight, Tensor bias, float eps, ScalarType? dtype=None, "
    "Tensor? factors=None) -> (Tensor, Tensor, Tensor)",
    "add_layer_norm_backward(Tensor grad, Tensor? grad_sum, Tensor sum, Tensor weight, Tensor statistics, "
    "Tensor? factors, ScalarType branch_dtype) -> (Tensor, Tensor, Tensor)",
    "layer_norm(Tensor x, Tensor weight, Tensor bias, float eps, ScalarType? dtype=None) -> (Tensor, Tensor)",
    "layer_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor statistics) -> (Tensor, Tensor)",
)
