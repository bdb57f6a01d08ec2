// peftkern._host: what Python asks the host side without loading torch: how the binaries were built, the tables they
// hold, and the pure launch-configuration functions of the CUDA kernels.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "adamw8bit/step_config.h"
#include "bottleneck/config.h"
#include "common/dynamic_map.h"
#include "common/nf4_code.h"
#include "gemm/gemm_config.h"
#include "host/optimizer_plan.h"
#include "lora_matmul/covers.h"
#include "nf4/convert_config.h"
#include "nf4/encode_table.h"
#include "nf4/matmul_config.h"
#include "nf4/mid_m_config.h"
#include "nf4/small_m_config.h"
#include "nf4/tile_config.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["compiler"] = __VERSION__;
  info["cuda_archs"] = PEFTKERN_CUDA_ARCHS;
  info["stable_abi_target"] = "2.10";
  return info;
}

template <int N>
std::vector<float> to_vector(const float (&table)[N]) {
  return {table, table + N};
}

std::vector<std::string> cpu_features() {
  std::vector<std::string> features;
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2")) features.emplace_back("avx2");
  if (__builtin_cpu_supports("fma")) features.emplace_back("fma");
  if (__builtin_cpu_supports("avx512f")) features.emplace_back("avx512f");
  if (__builtin_cpu_supports("avx512bw")) features.emplace_back("avx512bw");
  if (__builtin_cpu_supports("avx512bf16")) features.emplace_back("avx512bf16");
#endif
  return features;
}

const char* kernel_name(peftkern::MatmulKernel kernel) {
  switch (kernel) {
    case peftkern::MatmulKernel::kGemv:
      return "gemv";
    case peftkern::MatmulKernel::kSmallM:
      return "small_m";
    case peftkern::MatmulKernel::kMidM:
      return "mid_m";
    case peftkern::MatmulKernel::kTile:
      return "tile";
    default:
      return "dequantize";
  }
}

py::tuple convert_config(const peftkern::ConvertConfig& config, int64_t tile) {
  return py::make_tuple(config.ctas, config.threads, tile);
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Host-side helpers of peftkern: build information, code tables, launch configurations.";
  m.def("build_info", &build_info, "How the binaries were built: compiler, CUDA architectures, stable-ABI target.");
  m.def("cpu_features", &cpu_features, "Instruction sets of this CPU that the C++ kernels can use.");
  m.def("nf4_code", [] { return to_vector(peftkern::kNF4Code); }, "The NF4 code book compiled in.");
  m.def(
      "dynamic_map",
      [](bool is_signed) { return to_vector(is_signed ? peftkern::kDynamicMapSigned : peftkern::kDynamicMapUnsigned); },
      py::arg("signed"), "The dynamic 8-bit map compiled in.");
  m.def(
      "adapter_covers",
      [](int64_t M, int64_t hidden, int64_t width, bool half, bool aligned, int compute_capability) {
        return peftkern::adapter_covers({M, hidden, width, half, aligned, compute_capability});
      },
      py::arg("M"), py::arg("hidden"), py::arg("width"), py::arg("half") = true, py::arg("aligned") = true,
      py::arg("compute_capability") = 90, "Whether the CUDA kernels take a bottleneck; else it is made of pieces.");
  m.def(
      "adapter_config",
      [](int64_t M, int64_t hidden, int clusters) {
        const auto c = peftkern::adapter_config(M, hidden, clusters);
        py::dict d;
        d["cluster"] = c.cluster;
        d["groups"] = c.groups;
        d["chunks"] = c.chunks;
        d["slots"] = c.slots;
        d["stages"] = c.stages;
        d["tile"] = c.tile;
        d["tiles"] = c.tiles;
        d["clusters"] = c.clusters;
        d["shared"] = peftkern::adapter_layout(c).total;
        return d;
      },
      py::arg("M"), py::arg("hidden"), py::arg("clusters") = 15,
      "Launch configuration of the CUDA bottleneck; clusters: as many as the device runs at once.");
  m.def(
      "adapter_gradient_config",
      [](int64_t M, int tiles, int multiprocessors) {
        const auto c = peftkern::gradient_config(M, tiles, multiprocessors);
        return py::make_tuple(c.steps, c.parts, c.blocks);
      },
      py::arg("M"), py::arg("tiles"), py::arg("multiprocessors") = 132,
      "(steps, parts, blocks) of the CUDA bottleneck's weight gradients; tiles of both gradients.");
  m.def(
      "lora_gemm_covers",
      [](int64_t M, int64_t N, int64_t K, int64_t rank, bool half, bool aligned, int compute_capability,
         uint32_t threshold) {
        return peftkern::lora_gemm_covers({M, N, K, rank, half, aligned, compute_capability, threshold});
      },
      py::arg("M"), py::arg("N"), py::arg("K"), py::arg("rank"), py::arg("half") = true, py::arg("aligned") = true,
      py::arg("compute_capability") = 90, py::arg("threshold") = 0,
      "Whether the CUDA kernel takes a LoRA matmul; else it is made of pieces.");
  m.def(
      "lora_few_tokens_kernel",
      [](int64_t M, int64_t N, int64_t K, int64_t rank, int64_t blocksize, bool half, bool aligned,
         int compute_capability) {
        return kernel_name(
            peftkern::lora_few_tokens_kernel({M, N, K, blocksize, half, aligned, compute_capability, false}, rank));
      },
      py::arg("M"), py::arg("N"), py::arg("K"), py::arg("rank"), py::arg("blocksize") = 64, py::arg("half") = true,
      py::arg("aligned") = true, py::arg("compute_capability") = 90,
      "Which CUDA kernel makes a LoRA matmul of few tokens over an NF4 weight; dequantize: none, it is made of "
      "pieces.");
  m.def("lora_group_covers", &peftkern::lora_group_covers, py::arg("M"), py::arg("K"), py::arg("N"), py::arg("ranks"),
        py::arg("half") = true, py::arg("aligned") = true, py::arg("compute_capability") = 90,
        "Whether the CUDA kernel takes several LoRA matmuls of one x, without dropout, in a launch.");
  m.def(
      "gemm_jobs",
      [](int64_t M, std::vector<int64_t> outs, int64_t depth, int projects, std::vector<int64_t> features_b,
         int64_t features_a, int blocks, bool masked, bool fused) {
        using namespace peftkern;
        const auto sizes = [](const std::vector<int64_t>& list) {
          GemmSizes s;
          for (const int64_t size : list) s.add(size);
          return s;
        };
        const GemmSchedule s = gemm_schedule(
            {M, sizes(outs), depth, projects, sizes(features_b), features_a, masked, masked, fused}, blocks);
        std::vector<std::tuple<int, int, int, int>> jobs;
        const auto add = [&](const GemmJob& job) {
          jobs.emplace_back(job.kind, job.tile, job.other, job.layer);
          return job.kind != kGemmFinish;
        };
        for (int block = 0; block < s.project_blocks; ++block) {
          for (int number = block; add(gemm_project(s, number)); number += s.project_blocks) {
          }
        }
        for (int i = 0; i < s.static_mains; ++i) add(gemm_main(s, i));
        for (const int queue : {kMains, kGradients}) {
          for (int i = 0; add(gemm_job(s, queue, i)); ++i) {
          }
        }
        const auto finish = [](const auto& job) { return std::get<0>(job) == kGemmFinish; };
        jobs.erase(std::remove_if(jobs.begin(), jobs.end(), finish), jobs.end());
        return std::make_tuple(jobs, s.parts, s.blocks, s.project_blocks);
      },
      py::arg("M"), py::arg("outs"), py::arg("depth"), py::arg("projects"), py::arg("features_b"),
      py::arg("features_a"), py::arg("blocks") = 132, py::arg("masked") = false, py::arg("fused") = false,
      "All jobs (kind, tile, and out tile, part, or which of its block's for its layer, layer) of a GEMM launch, the "
      "parts of a gradient, the blocks, and those that project. Kinds: 1 project, 2 main, 3 gradient of B, 4 of A, 5 "
      "sum "
      "of what fused projects left.");
  m.def("gemm_fuses", &peftkern::gemm_fuses, py::arg("M"), py::arg("outs"), py::arg("rank"), py::arg("features"),
        "Whether a backward pass whose dx is [M, outs] and whose dB is [features, rank] makes it in its project jobs.");
  m.def("gemm_fused_blocks", &peftkern::gemm_fused_blocks, py::arg("M"), py::arg("outs"),
        "Blocks that do the project jobs of such a pass.");
  m.def(
      "gemm_gradient_blocks",
      [](int64_t M, int64_t N, int64_t K, bool fused, int blocks) {
        return peftkern::gemm_schedule({M, K, N, 1, N, K, false, false, fused}, blocks).skinny_blocks;
      },
      py::arg("M"), py::arg("N"), py::arg("K"), py::arg("fused"), py::arg("blocks") = 132,
      "Blocks of a backward pass for all gradients, without dropout, that take gradients before main tiles.");
  m.def("gemm_fragment_column", &peftkern::gemm_fragment_column, py::arg("k"),
        "Where column k of P1 lies for the GEMM's masked projections.");
  m.def(
      "nf4_dequantize_config",
      [](int64_t numel, int itemsize) {
        return convert_config(peftkern::nf4_dequantize_config(numel, itemsize), peftkern::dequantize_tile(itemsize));
      },
      py::arg("numel"), py::arg("itemsize"),
      "(CTAs, threads, weights per CTA) of the CUDA dequantize of `numel` weights to a dtype of `itemsize` bytes.");
  m.def(
      "nf4_quantize_config",
      [](int64_t numel) { return convert_config(peftkern::nf4_quantize_config(numel), peftkern::kQuantizeTile); },
      py::arg("numel"), "(CTAs, threads, weights per CTA) of the CUDA quantize of `numel` weights.");
  m.def(
      "nf4_quantize_absmax_config",
      [](int64_t numel, int64_t blocksize, int multiprocessors) {
        const auto config = peftkern::nf4_quantize_absmax_config(numel, blocksize, multiprocessors);
        return py::make_tuple(config.ctas, config.threads);
      },
      py::arg("numel"), py::arg("blocksize"), py::arg("multiprocessors"),
      "(CTAs, threads) of the CUDA double quantization of `numel` scales; a resident grid that loops over blocks.");
  m.def(
      "nf4_encode_table",
      [] {
        std::vector<std::pair<float, int>> bins;
        for (const auto& bin : peftkern::make_encode_table().bins) bins.emplace_back(bin.threshold, bin.base);
        return bins;
      },
      "(threshold, thresholds in lower bins) of each bin of the CUDA quantize's lookup.");
  m.def(
      "nf4_scratch_bytes", [] { return peftkern::kScratchBytes; },
      "Most bytes of dequantized weight that the CUDA NF4 matmul holds; dX holds the whole weight.");
  m.def("nf4_scratch_rows", &peftkern::scratch_rows, py::arg("N"), py::arg("K"), py::arg("element_size"),
        py::arg("blocksize"), py::arg("nested_blocksize"),
        "Weight rows that the CUDA NF4 matmul dequantizes at a time; nested_blocksize 1 without double quantization.");
  m.def(
      "nf4_matmul_kernel",
      [](int64_t M, int64_t N, int64_t K, int64_t blocksize, bool half, bool aligned, int compute_capability, bool dx) {
        return kernel_name(peftkern::matmul_kernel({M, N, K, blocksize, half, aligned, compute_capability, dx}));
      },
      py::arg("M"), py::arg("N"), py::arg("K"), py::arg("blocksize") = 64, py::arg("half") = true,
      py::arg("aligned") = true, py::arg("compute_capability") = 90, py::arg("dx") = false,
      "Which CUDA kernel makes an NF4 matmul: gemv, small_m, mid_m, tile, or dequantize and a GEMM.");
  m.def(
      "nf4_own_gemm",
      [](int64_t M, int64_t N, int64_t K, bool half, bool aligned, int compute_capability, bool dx,
         int multiprocessors) {
        return peftkern::own_gemm({M, N, K, 64, half, aligned, compute_capability, dx}, multiprocessors);
      },
      py::arg("M"), py::arg("N"), py::arg("K"), py::arg("half") = true, py::arg("aligned") = true,
      py::arg("compute_capability") = 90, py::arg("dx") = false, py::arg("multiprocessors") = 132,
      "Whether the package's own GEMM, not the library's, multiplies the dequantized weight.");
  m.def(
      "nf4_tile_config",
      [](int64_t M, int64_t outs, int64_t contraction, int multiprocessors) {
        const auto c = peftkern::tile_config(M, outs, contraction, multiprocessors);
        return py::make_tuple(c.tokens, c.token_tiles, c.out_tiles, c.whole, c.split);
      },
      py::arg("M"), py::arg("outs"), py::arg("contraction"), py::arg("multiprocessors") = 132,
      "(tokens per tile, tiles of tokens, tiles of outs, tiles made by one block, blocks that share each of the "
      "others) "
      "of the wgmma NF4 matmul.");
  m.def(
      "nf4_mid_m_config",
      [](int64_t M, int64_t N, int64_t K, int multiprocessors, int padded) {
        const auto c = peftkern::nf4_mid_m_config(M, N, K, multiprocessors);
        py::dict d;
        d["parts"] = padded > 0 ? peftkern::nf4_mid_m_parts(c, K, padded, multiprocessors) : 0;
        d["tokens"] = c.shape->tokens;
        d["max_rows"] = c.shape->rows;
        d["blocks"] = c.shape->blocks;
        d["threads"] = c.shape->threads();
        d["rows"] = c.rows;
        d["tiles"] = c.tiles;
        d["split"] = c.split;
        return d;
      },
      py::arg("M"), py::arg("N"), py::arg("K"), py::arg("multiprocessors") = 132, py::arg("padded") = 0,
      "Launch configuration of the CUDA NF4 matmul for 17 to 128 tokens; padded: columns of a low-rank term's S.");
  m.def(
      "nf4_small_m_config",
      [](int64_t M, int64_t N, int64_t K, int multiprocessors, int64_t smem_limit, int padded) {
        const auto c = peftkern::nf4_small_m_config(M, N, K, multiprocessors, smem_limit, padded);
        py::dict d;
        d["tokens"] = c.shape.tokens();
        d["quads"] = c.shape.quads;
        d["slices"] = c.shape.slices();
        d["rows"] = c.shape.rows();
        d["threads"] = c.shape.threads();
        d["ctas_per_sm"] = c.ctas_per_sm;
        d["passes"] = c.passes;
        d["tiles"] = c.tiles;
        d["ctas"] = c.ctas;
        d["parts"] = c.parts;
        d["makers"] = c.makers;
        d["smem"] = c.smem;
        return d;
      },
      py::arg("M"), py::arg("N"), py::arg("K"), py::arg("multiprocessors") = 132, py::arg("smem_limit") = 231424,
      py::arg("padded") = 0,
      "Launch configuration of the CUDA NF4 matmul for up to 32 tokens; padded: columns of a low-rank term's S.");
  m.def(
      "adamw8bit_step_config",
      [](int64_t chunks, int multiprocessors, int major, int shared_limit) {
        const auto c = peftkern::adamw_step_config(chunks, multiprocessors, major, shared_limit);
        return py::make_tuple(c.ctas, c.staged, c.shared_bytes);
      },
      py::arg("chunks"), py::arg("multiprocessors") = 132, py::arg("major") = 9, py::arg("shared_limit") = 232448,
      "(blocks, tiles fetched by the copy engine, bytes of shared memory) of the CUDA AdamW step.");
  m.def("adamw8bit_look_ctas", &peftkern::adamw_look_ctas, py::arg("chunks"), py::arg("multiprocessors"),
        py::arg("norm"), "Blocks of the look at the gradients.");
  m.def(
      "adamw8bit_chunks",
      [](int64_t numel) { return py::make_tuple(peftkern::adamw_chunks(numel), peftkern::adamw_entries(numel)); },
      py::arg("numel"), "(chunks, entries of a launch) that a tensor takes.");
  m.def(
      "adamw8bit_kinds",
      [](uint32_t numel, bool aligned, bool blocks) {
        const uint32_t kinds = peftkern::adamw_kinds(numel, aligned, blocks);
        return py::make_tuple(kinds >> 4, kinds & 15);
      },
      py::arg("numel"), py::arg("aligned"), py::arg("blocks"),
      "How the chunks of a tensor can be moved, (all but the last, the last): 2 whole tiles, 4 whole blocks with their "
      "scales, 8 not full.");
  m.def("adamw8bit_table_words", [] { return peftkern::kTableSize; }, "Words of the CUDA step's code tables.");
  peftkern::define_optimizer_plan(m);
}
