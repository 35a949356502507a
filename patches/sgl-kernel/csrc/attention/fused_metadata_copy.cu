// SPDX-License-Identifier: Apache-2.0
// Generated from the sources of sglang-nsa-fused by its patches/sgl-kernel/generate.py; do not edit.
// The torch form of sglang-nsa-fused's copy: reads arguments, picks device and stream, launches.
#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <array>
#include <optional>
#include <vector>

// What one launch reads and writes. Plain structs: no torch, no Python, no CUDA.

#include <cstdint>

namespace nsa_fused {

constexpr int kMaxDestinations = 16;
constexpr int kTileCols = 1024;  // what one block copies: 16 bytes for each of its threads

enum class Mode { kDecode = 0, kTargetVerify = 1, kDraftExtend = 2 };

// The metadata tensors, in the order of sglang's fused_metadata_copy_cuda; all int32. n is bs in decode and
// seqlens_expanded_size otherwise. The schedule is not in sglang's signature: it lets deep_gemm's result ride along.
enum Field {
  kCacheSeqlens,     // [bs]
  kCuSeqlensK,       // [bs + 1], element 0 is never copied
  kPageTable1,       // [rows, cols], one column per token
  kNsaCacheSeqlens,  // [n]
  kSeqlensExpanded,  // [seqlens_expanded_size], not in decode
  kNsaCuSeqlensK,    // [n + 1], element 0 is never copied
  kRealPageTable,    // [rows, ceil(cols / page_size)], optional
  kNumSplits,        // [n + 1], FlashMLA, optional
  kTileMetadata,     // [num_sm_parts, 8], FlashMLA, optional
  kSchedule,         // [num_sms + 1, 2], DeepGEMM paged MQA logits, optional
  kNumFields,
  kContextLens2d = kNumFields,  // [n, 1], as DeepGEMM takes lengths; generated, never copied
  kTopkPlan,                    // [n + 1, 2], of sglang's top-k v2; generated, never copied
  kNumGenerated
};

// A block of rows that goes from one source to num_dst destinations. Only tables have more than one row.
struct CopyField {
  const int32_t* src;  // [rows, cols]
  int64_t src_pitch;   // in elements, as all pitches
  int64_t cols;
  int32_t rows;
  int32_t num_dst;
  int32_t tiles_per_row;
  int32_t end_tile;  // one past this field's last tile; the fields' tiles follow each other
};

template <int kCapacity>
struct CopyParams {
  CopyField field[kNumFields];
  int32_t* dst[kNumFields][kCapacity];       // [rows, cols] each
  int64_t dst_pitch[kNumFields][kCapacity];  // of tables; 0 elsewhere
};

static_assert(sizeof(CopyParams<kMaxDestinations>) <= 4096, "kernel parameters must fit 4 KiB");

}  // namespace nsa_fused

// The destinations of one copy, checked once, and the sources and sizes of each replay, checked before it. No binding's
// types: tvm-ffi's and torch's forms share it.

// What both operations check of their arguments. No binding's types: tvm-ffi's and torch's forms share it.

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

namespace nsa_fused {

// A parameter's name; put together only where an error needs it.
struct Name {
  const char* text;
  int index = -1;  // which destination, where there are several
};

inline std::string to_text(const std::string& text) { return text; }
inline std::string to_text(int64_t number) { return std::to_string(number); }
inline std::string to_text(Name name) { return name.text + (name.index < 0 ? "" : std::to_string(name.index)); }

// What is wrong with an argument; bindings turn it into Python's ValueError.
struct BadArgument {
  std::string text;
};

// No streams: they crash on numbers where a process holds two C++ runtimes.
template <typename... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  throw BadArgument{(to_text(parts) + ...)};
}

enum class Form { kVector, kTable, kWhole };  // kWhole: copied as it lies, whatever its shape

// A tensor as rows of cols 4-byte words; a vector is one row.
struct View {
  bool given = false;
  int32_t* data = nullptr;
  int64_t rows = 0, cols = 0, pitch = 0;

  const int32_t* begin() const { return data; }
  const int32_t* end() const { return rows && cols ? data + (rows - 1) * pitch + cols : data; }
  bool same_memory(const View& o) const {
    return data == o.data && rows == o.rows && cols == o.cols && (rows <= 1 || pitch == o.pitch);
  }
};

inline View make_view(Form form, Name name, int32_t* data, int ndim, const int64_t* shape, const int64_t* strides) {
  if (form == Form::kWhole) {
    int64_t numel = 1;
    for (int i = ndim - 1; i >= 0; numel *= shape[i--])
      if (shape[i] > 1 && strides[i] != numel) refuse(name, ": expected a contiguous tensor, got one with gaps");
    return {true, data, 1, numel, numel};
  }
  const int expected = form == Form::kTable ? 2 : 1;
  if (ndim != expected) refuse(name, ": expected ", expected, expected == 1 ? " dimension" : " dimensions", ", got ", ndim);
  const int64_t rows = ndim == 2 ? shape[0] : 1, cols = shape[ndim - 1];
  if (cols > 1 && strides[ndim - 1] != 1) refuse(name, ": expected last stride 1, got ", strides[ndim - 1]);
  return {true, data, rows, cols, rows > 1 ? strides[0] : cols};
}

inline void check_rows_apart(const View& view, Name name) {
  if (view.rows > 1 && view.pitch < view.cols)
    refuse(name, ": expected rows apart, got a row stride of ", view.pitch, " for ", view.cols, " columns");
}

inline void check_fits(const View& view, const View& need, Form form, Name name) {
  if (view.rows >= need.rows && view.cols >= need.cols) return;
  const auto shape = [form](const View& v) {
    const std::string cols = std::to_string(v.cols);
    return form == Form::kTable ? "[" + std::to_string(v.rows) + ", " + cols + "]" : "[" + cols + "]";
  };
  refuse(name, ": expected a shape of at least ", shape(need), ", got ", shape(view));
}

// Whether two views have an element in common: their rows in order of address, side by side.
inline bool overlap(const View& a, const View& b) {
  if (a.begin() >= b.end() || b.begin() >= a.end()) return false;
  for (int64_t i = 0, j = 0; i < a.rows && j < b.rows;) {
    const int32_t *x = a.data + i * a.pitch, *y = b.data + j * b.pitch;
    if (x < y + b.cols && y < x + a.cols) return true;
    x < y ? ++i : ++j;
  }
  return false;
}

// The tensors that a launch writes, each once.
class Written {
 public:
  struct Tensor {
    View view;
    int f, d;               // field and destination
    const int32_t* reach;   // the highest end of this one and of all that begin before it
  };

  void add(const View& view, int f, int d) { tensors_.push_back({view, f, d, nullptr}); }

  // Sorts by address; to be called once, after the last add; of equal addresses the later one is named. name: (f, d) -> Name.
  template <typename NameOf>
  void check_apart(const NameOf& name) {
    std::stable_sort(tensors_.begin(), tensors_.end(),
              [](const Tensor& a, const Tensor& b) { return a.view.begin() < b.view.begin(); });
    const int32_t* reach = nullptr;
    for (auto w = tensors_.begin(); w != tensors_.end(); ++w) {
      for (auto v = w; v != tensors_.begin() && (--v)->reach > w->view.begin();)
        if (overlap(v->view, w->view))
          refuse(name(w->f, w->d), ": expected memory of its own, but it overlaps ", name(v->f, v->d));
      w->reach = reach = std::max(reach, w->view.end());
    }
  }

  // The first tensor that a source shares an element with and may not; null: none. may_share: (Tensor) -> bool.
  template <typename MayShare>
  const Tensor* conflict(const View& src, const MayShare& may_share) const {
    auto w = std::lower_bound(tensors_.begin(), tensors_.end(), src.end(),
                              [](const Tensor& a, const int32_t* end) { return a.view.begin() < end; });
    while (w != tensors_.begin() && (--w)->reach > src.begin())
      if (!may_share(*w) && overlap(src, w->view)) return &*w;
    return nullptr;
  }

  auto begin() const { return tensors_.begin(); }
  auto end() const { return tensors_.end(); }

 private:
  std::vector<Tensor> tensors_;
};

}  // namespace nsa_fused

// Names and forms of the metadata tensors.

namespace nsa_fused {

constexpr const char* kDstName[kNumGenerated] = {
    "cache_seqlens_dst",     "cu_seqlens_k_dst",       "page_table_1_dst",      "nsa_cache_seqlens_dst",
    "seqlens_expanded_dst",  "nsa_cu_seqlens_k_dst",   "real_page_table_dst",   "flashmla_num_splits_dst",
    "flashmla_metadata_dst", "paged_mqa_schedule_dst", "paged_mqa_ctx_lens_2d_dst",
    "topk_v2_plan_dst"};

inline Name dst_name(int f, int d, int num_dst) { return {kDstName[f], num_dst > 1 ? d : -1}; }

constexpr Form form_of(int f) {
  if (f == kPageTable1 || f == kRealPageTable) return Form::kTable;
  return f == kTileMetadata || f == kSchedule || f == kContextLens2d || f == kTopkPlan ? Form::kWhole : Form::kVector;
}

constexpr int first_element(int f) { return f == kCuSeqlensK || f == kNsaCuSeqlensK; }

}  // namespace nsa_fused

namespace nsa_fused {

constexpr const char* kSrcName[kNumFields] = {
    "cache_seqlens_src",     "cu_seqlens_k_src",       "page_indices_src",    "nsa_cache_seqlens_src",
    "seqlens_expanded_src",  "nsa_cu_seqlens_k_src",   "real_page_table_src", "flashmla_num_splits_src",
    "flashmla_metadata_src", "paged_mqa_schedule_src"};
inline Name src_name(int f) { return {kSrcName[f]}; }

constexpr bool is_optional(int f) { return f == kRealPageTable || f == kNumSplits || form_of(f) == Form::kWhole; }
constexpr bool is_written(int f, Mode mode) { return f != kSeqlensExpanded || mode != Mode::kDecode; }

struct Sizes {
  int64_t bs, max_len, max_seqlen_k, seqlens_expanded_size;
};

inline Mode to_mode(int64_t mode) {
  if (mode < 0 || mode > 2)
    refuse("forward_mode: expected 0 (decode), 1 (target verify) or 2 (draft extend), got ", mode);
  return static_cast<Mode>(mode);
}

// Holds addresses, not tensors: whoever makes a plan keeps those alive.
class CopyPlan {
 public:
  // dst: num_dst x kNumFields. What the mode does not write is not looked at.
  CopyPlan(Mode mode, const View* dst, int num_dst) : mode_(mode), num_dst_(num_dst) {
    if (num_dst < 1 || num_dst > kMaxDestinations)
      refuse("destinations: expected 1 to ", kMaxDestinations, ", got ", num_dst);
    for (int d = 0; d < num_dst; ++d)
      for (int f = 0; f < kNumFields; ++f)
        if (is_written(f, mode)) add(dst[d * kNumFields + f], f, d);
    written_.check_apart([this](int f, int d) { return name(f, d); });
  }

  Mode mode() const { return mode_; }
  int num_dst() const { return num_dst_; }

  void check(const Sizes& s) const {
    const bool decode = mode_ == Mode::kDecode;
    const auto not_negative = [](const char* name, int64_t value) {
      if (value < 0) refuse(name, ": expected 0 or more, got ", value);
    };
    not_negative("bs", s.bs);
    not_negative(decode ? "max_len" : "max_seqlen_k", decode ? s.max_len : s.max_seqlen_k);
    not_negative("seqlens_expanded_size", s.seqlens_expanded_size);
    if (decode && s.seqlens_expanded_size != s.bs)
      refuse("seqlens_expanded_size: expected bs = ", s.bs, " in decode, got ", s.seqlens_expanded_size);
    if (mode_ == Mode::kTargetVerify && s.bs > 0 && s.seqlens_expanded_size % s.bs != 0)
      refuse("seqlens_expanded_size: expected a multiple of bs = ", s.bs, " in target verify, got ",
             s.seqlens_expanded_size);
  }

  // src: kNumFields; sizes: checked, bs not 0. False: nothing to copy.
  template <int kCapacity>
  bool pack(const View* src, const Sizes& sizes, CopyParams<kCapacity>* params) const {
    int64_t tiles = 0;
    for (int f = 0; f < kNumFields; ++f) {
      CopyField& field = params->field[f];
      field = CopyField{};
      if (src[f].given || dst_[f][0].given) {
        const View need = extent(f, src[f], sizes, src[kPageTable1]);
        check_pair(f, src[f], need);
        const int first = first_element(f);
        field.src = src[f].data + first;
        field.src_pitch = src[f].pitch;
        field.cols = need.cols - first;
        field.rows = static_cast<int32_t>(need.rows);
        field.tiles_per_row = static_cast<int32_t>((field.cols + kTileCols - 1) / kTileCols);
        tiles += need.rows * field.tiles_per_row;
        if (tiles > INT32_MAX) refuse(src_name(f), ": expected less than ", INT32_MAX, " tiles, got ", tiles);
      }
      field.end_tile = static_cast<int32_t>(tiles);
    }
    for (const Written::Tensor& w : written_) {
      const int at = params->field[w.f].num_dst++;
      params->dst[w.f][at] = w.view.data + first_element(w.f);
      params->dst_pitch[w.f][at] = form_of(w.f) == Form::kTable ? w.view.pitch : 0;
    }
    return tiles > 0;
  }

 private:
  Name name(int f, int d) const { return dst_name(f, d, num_dst_); }

  void add(const View& view, int f, int d) {
    if (!view.given && !is_optional(f)) refuse(name(f, d), ": expected an int32 tensor, got None");
    if (d > 0 && view.given != dst_[f][0].given)
      refuse(name(f, d), ": expected ", view.given ? "None" : "a tensor", " as for ", name(f, 0), ", got ",
             view.given ? "a tensor" : "None");
    check_rows_apart(view, name(f, d));
    dst_[f][d] = view;
    // Step backends may share a tensor, as upstream's cache_seqlens up to 0.5.13: it is written once.
    const auto same = [&](const View& earlier) { return earlier.same_memory(view); };
    if (view.given && std::none_of(dst_[f], dst_[f] + d, same)) written_.add(view, f, d);
  }

  // The shape that moves; element 0 of cumulative lengths counts.
  View extent(int f, const View& src, const Sizes& s, const View& page_indices) const {
    const bool decode = mode_ == Mode::kDecode;
    const int64_t n = decode ? s.bs : s.seqlens_expanded_size;
    const int64_t rows = mode_ == Mode::kDraftExtend ? std::min(page_indices.rows, n) : n;
    switch (f) {
      case kCacheSeqlens: return {true, nullptr, 1, s.bs};
      case kCuSeqlensK: return {true, nullptr, 1, s.bs + 1};
      case kPageTable1: return {true, nullptr, rows, decode ? s.max_len : s.max_seqlen_k};
      case kNsaCacheSeqlens:
      case kSeqlensExpanded: return {true, nullptr, 1, n};
      case kNsaCuSeqlensK:
      case kNumSplits: return {true, nullptr, 1, n + 1};
      case kRealPageTable: return {true, nullptr, rows, src.cols};
      default: return {true, nullptr, 1, src.cols};
    }
  }

  void check_pair(int f, const View& src, const View& need) const {
    if (!src.given) refuse(src_name(f), ": expected an int32 tensor as its destination is given, got None");
    if (!dst_[f][0].given) refuse(Name{kDstName[f]}, ": expected an int32 tensor as its source is given, got None");
    check_fits(src, need, form_of(f), src_name(f));
    for (int d = 0; d < num_dst_; ++d) check_fits(dst_[f][d], need, form_of(f), name(f, d));
    // A source may be its own destination (upstream's cache_seqlens is), and nothing else that is written.
    const auto itself = [&](const Written::Tensor& w) {
      return w.f == f && w.view.data == src.data && (need.rows <= 1 || w.view.pitch == src.pitch);
    };
    if (const auto* w = written_.conflict(src, itself))
      refuse(src_name(f), ": expected memory that is not written, but it overlaps ", name(w->f, w->d));
  }

  Mode mode_;
  int num_dst_;
  View dst_[kNumFields][kMaxDestinations];
  Written written_;
};

}  // namespace nsa_fused

// Precomputed metadata -> one to sixteen step backends, in one launch.

#include <cuda_runtime.h>

namespace nsa_fused {

constexpr int kThreads = kTileCols / 4;
constexpr int kLine = 32;  // elements in a 128-byte line

__device__ __forceinline__ bool is_aligned(const int32_t* p) { return reinterpret_cast<uintptr_t>(p) % sizeof(int4) == 0; }

__device__ __forceinline__ int4 load4(const int32_t* p) {
  return is_aligned(p) ? *reinterpret_cast<const int4*>(p) : make_int4(p[0], p[1], p[2], p[3]);
}

__device__ __forceinline__ void store4(int32_t* p, int4 v) {
  if (is_aligned(p)) {
    *reinterpret_cast<int4*>(p) = v;
  } else {
    p[0] = v.x, p[1] = v.y, p[2] = v.z, p[3] = v.w;
  }
}

// One block per tile of one row of one field: read once, written to every destination.
template <int kCapacity>
__global__ void __launch_bounds__(kThreads) copy_kernel(const __grid_constant__ CopyParams<kCapacity> p) {
  int f = 0, first_tile = 0;
  while (static_cast<int>(blockIdx.x) >= p.field[f].end_tile) first_tile = p.field[f++].end_tile;
  const CopyField& field = p.field[f];
  const int row = (blockIdx.x - first_tile) / field.tiles_per_row;
  const int tile = (blockIdx.x - first_tile) % field.tiles_per_row;
  const int32_t* src = field.src + row * field.src_pitch;
  const auto dst = [&](int d) { return p.dst[f][d] + row * p.dst_pitch[f][d]; };

  // Tiles begin on a line of the first destination, since a line written in part costs L2 a merge, and one read in
  // part does not. Step backends have equal pitches, so the others mostly stand alike. Tile 0 takes the head as well.
  const int head = (kLine - reinterpret_cast<uintptr_t>(dst(0)) / sizeof(int32_t) % kLine) % kLine;
  const int64_t begin = head + static_cast<int64_t>(tile) * kTileCols;
  const int count = static_cast<int>(min(max(field.cols - begin, int64_t{0}), int64_t{kTileCols}));
  const int thread = threadIdx.x;

  if (thread < count / 4) {
    const int64_t col = begin + thread * 4;
    const int4 value = load4(src + col);
    for (int d = 0; d < field.num_dst; ++d) store4(dst(d) + col, value);
  }
  int64_t col = -1;  // of the head, for the first threads, or of the up to three elements behind the last four
  if (tile == 0 && thread < min(int64_t{head}, field.cols)) col = thread;
  if (thread >= kLine && thread - kLine < count % 4) col = begin + count / 4 * 4 + thread - kLine;
  if (col >= 0) {
    const int32_t value = src[col];
    for (int d = 0; d < field.num_dst; ++d) dst(d)[col] = value;
  }
}

template <int kCapacity>
cudaError_t launch_copy(const CopyParams<kCapacity>& params, cudaStream_t stream) {
  const int tiles = params.field[kNumFields - 1].end_tile;
  void* args[] = {const_cast<CopyParams<kCapacity>*>(&params)};
  return cudaLaunchKernel(reinterpret_cast<const void*>(copy_kernel<kCapacity>), tiles, kThreads, args, 0, stream);
}

}  // namespace nsa_fused

namespace nsa_fused {
namespace {

constexpr int kUpstreamFields = kSchedule;  // sglang's own signature has no schedule
constexpr int kMultiDestinations = 3;

// A tensor or None.
struct Arg {
  Arg(std::nullopt_t) : tensor(nullptr) {}
  Arg(const at::Tensor& t) : tensor(&t) {}
  Arg(const std::optional<at::Tensor>& t) : tensor(t ? &*t : nullptr) {}
  const at::Tensor* tensor;
};
using Args = std::array<Arg, kUpstreamFields>;

// All tensors must be on the device of the first.
View read(const Arg& arg, int f, Name name, std::optional<at::Device>& device) {
  if (!arg.tensor) return {};
  const at::Tensor& t = *arg.tensor;
  TORCH_CHECK_TYPE(t.scalar_type() == at::kInt, to_text(name), ": expected dtype int32, got ",
                   c10::getDtypeNames(t.scalar_type()).first);
  TORCH_CHECK_VALUE(device || t.is_cuda(), to_text(name), ": expected a CUDA tensor, got one on ", t.device());
  if (!device) device = t.device();
  TORCH_CHECK_VALUE(t.device() == *device, to_text(name), ": expected a tensor on ", *device,
                    " as those before it, got one on ", t.device());
  return make_view(form_of(f), name, t.data_ptr<int32_t>(), t.dim(), t.sizes().data(), t.strides().data());
}

void copy(int64_t forward_mode, const Args& src_args, const std::vector<Args>& dst_args, const Sizes& sizes) try {
  const Mode mode = to_mode(forward_mode);
  const int num_dst = dst_args.size();
  std::optional<at::Device> device;
  View dst[kMultiDestinations * kNumFields], src[kNumFields];
  for (int d = 0; d < num_dst; ++d)
    for (int f = 0; f < kUpstreamFields; ++f)
      if (is_written(f, mode)) dst[d * kNumFields + f] = read(dst_args[d][f], f, dst_name(f, d, num_dst), device);
  const CopyPlan plan(mode, dst, num_dst);
  plan.check(sizes);
  if (sizes.bs == 0) return;
  for (int f = 0; f < kUpstreamFields; ++f)
    if (is_written(f, mode)) src[f] = read(src_args[f], f, src_name(f), device);

  CopyParams<kMultiDestinations> params;
  if (!plan.pack(src, sizes, &params)) return;
  const c10::cuda::CUDAGuard guard(*device);
  C10_CUDA_CHECK(launch_copy(params, at::cuda::getCurrentCUDAStream()));
} catch (const BadArgument& bad) {
  TORCH_CHECK_VALUE(false, bad.text);
}

}  // namespace
}  // namespace nsa_fused

using nsa_fused::Args;
using OptionalTensor = std::optional<at::Tensor>;

void fused_metadata_copy_cuda(
    const at::Tensor& cache_seqlens_src, const at::Tensor& cu_seqlens_k_src, const at::Tensor& page_indices_src,
    const at::Tensor& nsa_cache_seqlens_src, const OptionalTensor& seqlens_expanded_src,
    const at::Tensor& nsa_cu_seqlens_k_src, const OptionalTensor& real_page_table_src,
    const OptionalTensor& flashmla_num_splits_src, const OptionalTensor& flashmla_metadata_src,
    const at::Tensor& cache_seqlens_dst, const at::Tensor& cu_seqlens_k_dst, const at::Tensor& page_table_1_dst,
    const at::Tensor& nsa_cache_seqlens_dst, const OptionalTensor& seqlens_expanded_dst,
    const at::Tensor& nsa_cu_seqlens_k_dst, const OptionalTensor& real_page_table_dst,
    const OptionalTensor& flashmla_num_splits_dst, const OptionalTensor& flashmla_metadata_dst,
    int64_t forward_mode, int64_t bs, int64_t max_len, int64_t max_seqlen_k, int64_t seqlens_expanded_size) {
  nsa_fused::copy(
      forward_mode,
      Args{cache_seqlens_src, cu_seqlens_k_src, page_indices_src, nsa_cache_seqlens_src, seqlens_expanded_src,
           nsa_cu_seqlens_k_src, real_page_table_src, flashmla_num_splits_src, flashmla_metadata_src},
      {Args{cache_seqlens_dst, cu_seqlens_k_dst, page_table_1_dst, nsa_cache_seqlens_dst, seqlens_expanded_dst,
            nsa_cu_seqlens_k_dst, real_page_table_dst, flashmla_num_splits_dst, flashmla_metadata_dst}},
      {bs, max_len, max_seqlen_k, seqlens_expanded_size});
}

// Decode, to three step backends.
void fused_metadata_copy_multi_cuda(
    const at::Tensor& cache_seqlens_src, const at::Tensor& cu_seqlens_k_src, const at::Tensor& page_indices_src,
    const at::Tensor& nsa_cache_seqlens_src, const at::Tensor& nsa_cu_seqlens_k_src,
    const OptionalTensor& real_page_table_src, const OptionalTensor& flashmla_num_splits_src,
    const OptionalTensor& flashmla_metadata_src,
    const at::Tensor& cache_seqlens_dst0, const at::Tensor& cu_seqlens_k_dst0, const at::Tensor& page_table_1_dst0,
    const at::Tensor& nsa_cache_seqlens_dst0, const at::Tensor& nsa_cu_seqlens_k_dst0,
    const OptionalTensor& real_page_table_dst0, const OptionalTensor& flashmla_num_splits_dst0,
    const OptionalTensor& flashmla_metadata_dst0,
    const at::Tensor& cache_seqlens_dst1, const at::Tensor& cu_seqlens_k_dst1, const at::Tensor& page_table_1_dst1,
    const at::Tensor& nsa_cache_seqlens_dst1, const at::Tensor& nsa_cu_seqlens_k_dst1,
    const OptionalTensor& real_page_table_dst1, const OptionalTensor& flashmla_num_splits_dst1,
    const OptionalTensor& flashmla_metadata_dst1,
    const at::Tensor& cache_seqlens_dst2, const at::Tensor& cu_seqlens_k_dst2, const at::Tensor& page_table_1_dst2,
    const at::Tensor& nsa_cache_seqlens_dst2, const at::Tensor& nsa_cu_seqlens_k_dst2,
    const OptionalTensor& real_page_table_dst2, const OptionalTensor& flashmla_num_splits_dst2,
    const OptionalTensor& flashmla_metadata_dst2,
    int64_t bs, int64_t max_len, int64_t seqlens_expanded_size) {
  nsa_fused::copy(
      /*forward_mode=*/0,
      Args{cache_seqlens_src, cu_seqlens_k_src, page_indices_src, nsa_cache_seqlens_src, std::nullopt,
           nsa_cu_seqlens_k_src, real_page_table_src, flashmla_num_splits_src, flashmla_metadata_src},
      {Args{cache_seqlens_dst0, cu_seqlens_k_dst0, page_table_1_dst0, nsa_cache_seqlens_dst0, std::nullopt,
            nsa_cu_seqlens_k_dst0, real_page_table_dst0, flashmla_num_splits_dst0, flashmla_metadata_dst0},
       Args{cache_seqlens_dst1, cu_seqlens_k_dst1, page_table_1_dst1, nsa_cache_seqlens_dst1, std::nullopt,
            nsa_cu_seqlens_k_dst1, real_page_table_dst1, flashmla_num_splits_dst1, flashmla_metadata_dst1},
       Args{cache_seqlens_dst2, cu_seqlens_k_dst2, page_table_1_dst2, nsa_cache_seqlens_dst2, std::nullopt,
            nsa_cu_seqlens_k_dst2, real_page_table_dst2, flashmla_num_splits_dst2, flashmla_metadata_dst2}},
      {bs, max_len, max_len, seqlens_expanded_size});
}
