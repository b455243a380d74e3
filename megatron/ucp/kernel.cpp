// The two inner loops of megatron.ucp: copy runs and digest runs. Both have numpy versions that give the same bits
// (digest.py, execute.py); these run without the GIL.
//
// Runs are int64 triples. For digest_runs: (atomic_start, local_start, length), as in fragment.py.
// For copy_runs: (target_local, source_local, length), as fragment.intersect returns them.

#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <utility>

namespace py = pybind11;
using u32 = std::uint32_t;
using u64 = std::uint64_t;
using i64 = std::int64_t;

// AVX-512 has a 64-bit multiply, worth a factor of 2-4 here; a clone per level keeps one portable binary.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif

static inline u64 mix(u64 x) {  // the finaliser of splitmix64
    x ^= x >> 30;
    x *= 0xbf58476d1ce4e5b9ULL;
    x ^= x >> 27;
    x *= 0x94d049bb133111ebULL;
    return x ^ (x >> 31);
}

CLONES
static void digest_stretch(const u32* values, u64 count, u64 index, u64 seed0, u64 seed1, u64* lanes) {
    u64 lane0 = 0, lane1 = 0;
    for (u64 i = 0; i < count; i++) {
        u64 h = mix((((index + i) << 32) | values[i]) + seed0);
        lane0 += h;
        u64 k = (h + seed1) * 0xd6e8feb86659fd93ULL;
        lane1 += k ^ (k >> 32);
    }
    lanes[0] += lane0;
    lanes[1] += lane1;
}

static void check(i64 start, i64 length, i64 numel) {
    if (start < 0 || length < 0 || start > numel - length) throw std::out_of_range("a run leaves its tensor");
}

static std::pair<u64, u64> digest_runs(std::uintptr_t values_address, i64 values_numel, std::uintptr_t runs_address,
                                       i64 num_runs, u64 seed0, u64 seed1) {
    py::gil_scoped_release release;
    const u32* values = reinterpret_cast<const u32*>(values_address);
    const i64* runs = reinterpret_cast<const i64*>(runs_address);
    u64 lanes[2] = {0, 0};
    for (i64 r = 0; r < num_runs; r++, runs += 3) {
        u64 index = runs[0];
        i64 local = runs[1], length = runs[2];
        check(local, length, values_numel);
        while (length > 0) {
            // The 32-bit index in the packed word wraps at 2^32 elements: what is above goes into the seed.
            u64 high = index >> 32, low = index & 0xffffffffULL;
            u64 stretch = (1ULL << 32) - low;
            if (stretch > static_cast<u64>(length)) stretch = length;
            digest_stretch(values + local, stretch, low, seed0 + high * 0x9e3779b97f4a7c15ULL, seed1, lanes);
            index += stretch;
            local += stretch;
            length -= stretch;
        }
    }
    return {lanes[0], lanes[1]};
}

static void copy_runs(std::uintptr_t target_address, i64 target_numel, std::uintptr_t source_address,
                      i64 source_numel, i64 element_size, std::uintptr_t runs_address, i64 num_runs) {
    py::gil_scoped_release release;
    char* target = reinterpret_cast<char*>(target_address);
    const char* source = reinterpret_cast<const char*>(source_address);
    const i64* runs = reinterpret_cast<const i64*>(runs_address);
    for (i64 r = 0; r < num_runs; r++, runs += 3) {
        check(runs[0], runs[2], target_numel);
        check(runs[1], runs[2], source_numel);
        std::memcpy(target + runs[0] * element_size, source + runs[1] * element_size, runs[2] * element_size);
    }
}

PYBIND11_MODULE(_kernel, m) {
    m.doc() = "Inner loops of megatron.ucp; addresses are those of contiguous host memory.";
    m.def("digest_runs", &digest_runs, py::arg("values_address"), py::arg("values_numel"), py::arg("runs_address"),
          py::arg("num_runs"), py::arg("seed0"), py::arg("seed1"));
    m.def("copy_runs", &copy_runs, py::arg("target_address"), py::arg("target_numel"), py::arg("source_address"),
          py::arg("source_numel"), py::arg("element_size"), py::arg("runs_address"), py::arg("num_runs"));
}
