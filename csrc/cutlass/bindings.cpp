// fusedmlp._cutlass: integers into GatedLinearFwd, and nothing else, as csrc/bindings.cpp. A module of its
// own, so that _C stays small and neither needs the other.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>

#include "../activations.cuh"
#include "cutlass.h"

namespace py = pybind11;

namespace fusedmlp {
namespace {

using Address = uintptr_t;

void* at(Address address) { return reinterpret_cast<void*>(address); }

template <const char* (*launch)(const GatedLinearFwd&, void*)>
void fwd(Address x, Address w_gate, Address w_up, Address b_gate, Address b_up, Address h, Address g,
         Address u, int64_t M, int64_t H, int64_t D, int64_t stride_x, int64_t stride_gate,
         int64_t stride_up, int64_t stride_h, int64_t stride_gu, int activation, std::array<float, 3> s,
         int dtype, int device, int multiprocessors, Address stream) {
  const GatedLinearFwd call{
      at(x),    at(w_gate), at(w_up), at(b_gate), at(b_up), at(h), at(g), at(u), M, H, D,
      stride_x, stride_gate, stride_up, stride_h, stride_gu, activation, {s[0], s[1], s[2]},
      static_cast<Dtype>(dtype), device, multiprocessors, -1};
  const char* failure;
  {
    py::gil_scoped_release release;
    failure = launch(call, at(stream));
  }
  if (failure != nullptr) throw std::runtime_error(failure);
}

template <const char* (*launch)(const GatedLinearFwd&, void*)>
void add(py::dict& ops, const char* arch) {
  for (const char* op : {"gated_linear_fwd", "linear_act_fwd"}) {
    ops[py::make_tuple(op, arch)] = py::cpp_function(&fwd<launch>, py::name(op));
  }
}

}  // namespace
}  // namespace fusedmlp

PYBIND11_MODULE(_cutlass, m) {
  using namespace fusedmlp;
  m.doc() = "Kernels of fusedmlp by CUTLASS's collectives: raw addresses in, work enqueued on a stream.";
  m.attr("CUDA") = FUSEDMLP_CUDA_VERSION;
  m.attr("ARCHS") = FUSEDMLP_ARCHS;
  m.attr("CUTLASS") = FUSEDMLP_CUTLASS_VERSION;
  py::dict ops;
#ifdef FUSEDMLP_SM90
  add<by_cutlass::fwd_sm90>(ops, FUSEDMLP_SM90);
#endif
#ifdef FUSEDMLP_SM100
  add<by_cutlass::fwd_sm100>(ops, FUSEDMLP_SM100);
#endif
  m.attr("OPS") = ops;
  m.attr("GROUP") = py::int_(by_cutlass::kGroup);
  m.attr("DTYPES") = py::dict(py::arg("bfloat16") = static_cast<int>(Dtype::bf16),
                              py::arg("float16") = static_cast<int>(Dtype::fp16));
  py::dict activations;
  for (const Named& row : kActivations) activations[row.name] = static_cast<int>(row.number);
  m.attr("ACTIVATIONS") = activations;
}
