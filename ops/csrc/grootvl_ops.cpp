// The operations of grootvl_ops, as seen by PyTorch's dispatcher. Kernels register themselves in csrc/cpu and
// csrc/cuda, gradients in csrc/autograd.cpp; shapes for tracing and autocast are registered in
// grootvl_ops/_library.py. What each operation does is documented in grootvl_ops/__init__.py.
#include <torch/library.h>

TORCH_LIBRARY(grootvl_ops, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def("edge_weights(Tensor features, str metric) -> Tensor", tags);
  m.def("grid_tree(Tensor weights, SymInt height, SymInt width, SymInt root) -> (Tensor, Tensor, Tensor)", tags);
  m.def("graph_tree(Tensor edges, Tensor weights, SymInt num_vertices, SymInt root) -> (Tensor, Tensor, Tensor)", tags);
  m.def(
      "tree_scan(Tensor x, Tensor decay, Tensor parent, Tensor order, Tensor subtree_size, bool up_only=False)"
      " -> Tensor",
      tags);
  m.def(
      "tree_scan_backward(Tensor grad, Tensor x, Tensor decay, Tensor parent, Tensor order, Tensor subtree_size,"
      " bool up_only=False) -> (Tensor, Tensor)",
      tags);
  m.def(
      "selective_scan(Tensor x, Tensor dt, Tensor dt_weight, Tensor dt_bias, Tensor A_log, Tensor B, Tensor parent,"
      " Tensor order, Tensor subtree_size, bool up_only=False) -> Tensor",
      tags);
  m.def(
      "selective_scan_backward(Tensor grad, Tensor x, Tensor dt, Tensor dt_weight, Tensor dt_bias, Tensor A_log,"
      " Tensor B, Tensor parent, Tensor order, Tensor subtree_size, bool up_only=False)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
      tags);
  m.def(
      "gated_norm(Tensor h, Tensor x, Tensor z, Tensor C, Tensor D_skip, Tensor h_weight, Tensor h_bias,"
      " Tensor out_weight, Tensor out_bias, float eps) -> (Tensor, Tensor)",
      tags);
  m.def(
      "gated_norm_backward(Tensor grad, Tensor h, Tensor x, Tensor z, Tensor C, Tensor D_skip, Tensor h_weight,"
      " Tensor h_bias, Tensor out_weight, Tensor out_bias, Tensor statistics)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
      tags);
  m.def("layer_norm(Tensor x, Tensor weight, Tensor bias, float eps, ScalarType? dtype=None) -> (Tensor, Tensor)",
        tags);
  m.def("layer_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor statistics) -> (Tensor, Tensor)", tags);
}
