// fusedmlp._C: integers into params structs, and nothing else. What they may be is checked once, in
// Python (fusedmlp/backends/cuda/).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <sstream>
#include <stdexcept>
#include <string>

#include "activations.cuh"
#include "binary_gemv.h"
#include "gated_linear.h"
#include "masked_gated_gemv.h"
#include "moe_route.h"

namespace py = pybind11;

namespace fusedmlp {
namespace {

using Address = uintptr_t;
using Scalars = std::array<float, 3>;

template <class T = void>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

template <class Params>
void enqueue(const char* (*launch)(const Params&, void*), const Params& params, Address stream) {
  const char* failure;
  {
    py::gil_scoped_release release;
    failure = launch(params, at(stream));
  }
  if (failure != nullptr) throw std::runtime_error(failure);
}

template <const char* (*launch)(const GatedLinearFwd&, void*)>
void gated_linear_fwd(Address x, Address w_gate, Address w_up, Address b_gate, Address b_up,
                      Address h, Address g, Address u, int64_t M, int64_t H, int64_t D,
                      int64_t stride_x, int64_t stride_gate, int64_t stride_up, int64_t stride_h,
                      int64_t stride_gu, int activation, Scalars s, int dtype, int device,
                      int multiprocessors, int variant, Address stream) {
  enqueue(launch,
          {at(x),    at(w_gate), at(w_up), at(b_gate), at(b_up),    at(h),
           at(g),    at(u),      M,        H,          D,           stride_x,
           stride_gate, stride_up, stride_h, stride_gu, activation, {s[0], s[1], s[2]},
           static_cast<Dtype>(dtype), device, multiprocessors, variant},
          stream);
}

template <const char* (*launch)(const GatedLinearBwd&, void*)>
void gated_linear_bwd(Address dy, Address w_down, Address g, Address u, Address dg, Address du,
                      Address h, Address sums, int64_t M, int64_t H, int64_t D, int64_t stride_dy,
                      int64_t stride_down, int64_t stride_gu, int64_t stride_dgu, int64_t stride_h,
                      int activation, Scalars s, int dtype, int device, int multiprocessors,
                      int variant, Address stream) {
  enqueue(launch,
          {at(dy),    at(w_down), at(g),     at(u),      at(dg),   at(du),
           at(h),     at<float>(sums), M,    H,          D,        stride_dy,
           stride_down, stride_gu, stride_dgu, stride_h, activation, {s[0], s[1], s[2]},
           static_cast<Dtype>(dtype), device, multiprocessors, variant},
          stream);
}

#ifdef FUSEDMLP_PORTABLE
void masked_gated_linear_fwd(Address x, Address w, Address planes, Address h, Address parts,
                             int64_t M, int64_t H, int64_t D, int64_t stride_x, int64_t stride_w,
                             int n_m, int splits, int activation, Scalars s, int dtype,
                             int device, Address stream) {
  enqueue(masked_gated_gemv,
          {at(x), at(w), at<uint8_t>(planes), at(h), at<float>(parts), M, H, D, stride_x, stride_w,
           n_m, splits, activation, {s[0], s[1], s[2]}, static_cast<Dtype>(dtype), device},
          stream);
}

using RouteDtype = MoeRoute::Dtype;
static_assert(static_cast<int>(RouteDtype::bf16) == static_cast<int>(Dtype::bf16) &&
              static_cast<int>(RouteDtype::fp16) == static_cast<int>(Dtype::fp16));

void top1_route_fwd(Address logits, Address expert, Address prob, Address log_sum_exp,
                    Address mean_prob, Address tokens, Address rows, Address offsets,
                    Address counts, Address rank, Address histograms, Address sums, int64_t T,
                    int64_t E, int64_t stride_t, int64_t stride_e, int64_t chunk, int64_t capacity,
                    int dtype, int device, Address stream) {
  enqueue(moe_route,
          {at(logits), at<int64_t>(expert), at(prob), at<float>(log_sum_exp), at<float>(mean_prob),
           at<int32_t>(tokens), at<int32_t>(rows), at<int32_t>(offsets), at<int32_t>(counts),
           at<int32_t>(rank), at<int32_t>(histograms), at<float>(sums), T, E, stride_t, stride_e,
           chunk, capacity, static_cast<RouteDtype>(dtype), device},
          stream);
}

void binary_linear_fwd(Address x, Address q_gate, Address s_gate, Address q_up, Address s_up,
                       Address b_gate, Address b_up, Address h, Address parts, int64_t M, int64_t H,
                       int64_t D, int64_t stride_x, int splits, int activation, Scalars s,
                       int dtype, int device, Address stream) {
  enqueue(binary_gemv,
          {at(x), at<uint32_t>(q_gate), at(s_gate), at<uint32_t>(q_up), at(s_up), at(b_gate),
           at(b_up), at(h), at<float>(parts), M, H, D, stride_x, splits, activation,
           {s[0], s[1], s[2]}, static_cast<Dtype>(dtype), device},
          stream);
}
#endif

// (op, architecture) -> launcher, and -> names of its variants in the order of their numbers.
struct Ops {
  py::dict launchers, variants;

  template <class Launcher>
  void add(const char* op, const std::string& arch, Launcher launcher) {
    const py::tuple key = py::make_tuple(op, arch);
    launchers[key] = py::cpp_function(launcher, py::name(op));
    variants[key] = py::list();
  }

  template <class Launcher, size_t COUNT>
  void add(const char* op, const std::string& arch, Launcher launcher,
           const Variant (&table)[COUNT]) {
    add(op, arch, launcher);
    py::list names = variants[py::make_tuple(op, arch)];
    for (const Variant& variant : table) names.append(variant.name);
  }
};

Ops ops() {
  Ops all;
#ifdef FUSEDMLP_SM90
  all.add("gated_linear_fwd", FUSEDMLP_SM90, &gated_linear_fwd<gated_linear_fwd_sm90>, kFwdSm90);
  all.add("gated_linear_bwd", FUSEDMLP_SM90, &gated_linear_bwd<gated_linear_bwd_sm90>, kBwdSm90);
  all.add("linear_act_fwd", FUSEDMLP_SM90, &gated_linear_fwd<gated_linear_fwd_sm90>, kFwdSm90);
  all.add("linear_act_bwd", FUSEDMLP_SM90, &gated_linear_bwd<gated_linear_bwd_sm90>, kBwdSm90);
#endif
#ifdef FUSEDMLP_SM100
  all.add("gated_linear_fwd", FUSEDMLP_SM100, &gated_linear_fwd<gated_linear_fwd_sm100>, kSm100);
  all.add("gated_linear_bwd", FUSEDMLP_SM100, &gated_linear_bwd<gated_linear_bwd_sm100>, kSm100);
  all.add("linear_act_fwd", FUSEDMLP_SM100, &gated_linear_fwd<gated_linear_fwd_sm100>, kSm100);
  all.add("linear_act_bwd", FUSEDMLP_SM100, &gated_linear_bwd<gated_linear_bwd_sm100>, kSm100);
#endif
#ifdef FUSEDMLP_PORTABLE  // each architecture that a .cu without its own serves
  std::istringstream portable(FUSEDMLP_PORTABLE);
  for (std::string arch; portable >> arch;) {
    all.add("masked_gated_linear_fwd", arch, &masked_gated_linear_fwd);
    all.add("top1_route_fwd", arch, &top1_route_fwd);
    all.add("route_to_fwd", arch, &top1_route_fwd);  // without logits
    all.add("binary_linear_fwd", arch, &binary_linear_fwd);
    all.add("binary_gated_linear_fwd", arch, &binary_linear_fwd);
  }
#endif
  return all;
}

py::dict numbered(std::initializer_list<const char*> names) {
  py::dict table;
  for (const char* name : names) table[name] = table.size();
  return table;
}

}  // namespace
}  // namespace fusedmlp

PYBIND11_MODULE(_C, m) {
  using namespace fusedmlp;
  m.doc() = "The CUDA kernels of fusedmlp: raw addresses in, work enqueued on a stream.";
  m.attr("CUDA") = FUSEDMLP_CUDA_VERSION;
  m.attr("ARCHS") = FUSEDMLP_ARCHS;
  const Ops all = ops();
  m.attr("OPS") = all.launchers;
  m.attr("VARIANTS") = all.variants;
  m.attr("SUM_ROWS") = py::int_(static_cast<int>(GatedLinearBwd::kSumRows));
  m.attr("DTYPES") = numbered({"bfloat16", "float16", "float32"});  // as MoeRoute has them
  m.attr("MAX_EXPERTS") = py::int_(static_cast<int>(MoeRoute::kMaxExperts));
  m.attr("MAX_CHUNK") = py::int_(static_cast<int>(MoeRoute::kMaxChunk));
  py::dict activations;
  for (const Named& row : kActivations) activations[row.name] = static_cast<int>(row.number);
  m.attr("ACTIVATIONS") = activations;
}
