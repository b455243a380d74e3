// The inner loops of megatron.ucp: copy runs, digest runs, CRC-32, and one pass from source files into an output file.
// All have Python versions that give the same bits (execute.py, digest.py, crc32.py, output_file.py); these run without
// the GIL.
//
// Runs are int64 triples. For digest_runs: (atomic_start, local_start, length), as in runs.py. For copy_runs:
// (target_local, source_local, length), as runs.intersect returns them.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include <fcntl.h>
#include <sys/types.h>
#include <unistd.h>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define HAS_PCLMUL 1
#if defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 9 : __GNUC__ >= 9)
#define HAS_VPCLMUL 1
#endif
#endif

namespace py = pybind11;
using u8 = std::uint8_t;
using u32 = std::uint32_t;
using u64 = std::uint64_t;
using i64 = std::int64_t;

// AVX-512 has a 64-bit multiply, worth a factor of 2-4 here; a clone per level keeps one portable binary.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif

// -- digest -----------------------------------------------------------------------------------------------------------

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

// Values that follow each other from atomic element `index`.
static void digest_values(const u32* values, u64 count, u64 index, u64 seed0, u64 seed1, u64* lanes) {
    while (count > 0) {
        // The 32-bit index in the packed word wraps at 2^32 elements: what is above goes into the seed.
        u64 high = index >> 32, low = index & 0xffffffffULL;
        u64 stretch = (1ULL << 32) - low;
        if (stretch > count) stretch = count;
        digest_stretch(values, stretch, low, seed0 + high * 0x9e3779b97f4a7c15ULL, seed1, lanes);
        index += stretch;
        values += stretch;
        count -= stretch;
    }
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
        check(runs[1], runs[2], values_numel);
        digest_values(values + runs[1], runs[2], runs[0], seed0, seed1, lanes);
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

// -- CRC-32 (zlib's) --------------------------------------------------------------------------------------------------

static constexpr u32 POLYNOMIAL = 0xedb88320;  // bit-reflected

struct CrcTables {  // "slicing by 8": eight bytes a step
    u32 of[8][256];
    CrcTables() {
        for (u32 i = 0; i < 256; i++) {
            u32 c = i;
            for (int bit = 0; bit < 8; bit++) c = c & 1 ? (c >> 1) ^ POLYNOMIAL : c >> 1;
            of[0][i] = c;
        }
        for (u32 i = 0; i < 256; i++)
            for (int k = 1; k < 8; k++) of[k][i] = (of[k - 1][i] >> 8) ^ of[0][of[k - 1][i] & 0xff];
    }
};

static u32 crc_by_table(u32 crc, const u8* data, size_t size) {  // of the inverted register
    static const CrcTables tables;
    const auto& t = tables.of;
    for (; size >= 8; data += 8, size -= 8) {
        u64 word;
        std::memcpy(&word, data, 8);
        word ^= crc;
        crc = t[7][word & 0xff] ^ t[6][word >> 8 & 0xff] ^ t[5][word >> 16 & 0xff] ^ t[4][word >> 24 & 0xff] ^
              t[3][word >> 32 & 0xff] ^ t[2][word >> 40 & 0xff] ^ t[1][word >> 48 & 0xff] ^ t[0][word >> 56];
    }
    while (size--) crc = t[0][(crc ^ *data++) & 0xff] ^ (crc >> 8);
    return crc;
}

#ifdef HAS_PCLMUL
// Folding by carry-less multiplication. Method and constants: Gopal et al., "Fast CRC Computation for Generic
// Polynomials Using PCLMULQDQ Instruction", Intel 2009 (the constants of the reflected polynomial of gzip).
#define PCLMUL __attribute__((target("pclmul,sse4.1")))

PCLMUL static inline __m128i fold(__m128i state, __m128i next, __m128i keys) {
    __m128i low = _mm_clmulepi64_si128(state, keys, 0x00), high = _mm_clmulepi64_si128(state, keys, 0x11);
    return _mm_xor_si128(_mm_xor_si128(low, high), next);
}

PCLMUL static u32 crc_by_folding(u32 crc, const u8* data, size_t size) {
    if (size < 64) return crc_by_table(crc, data, size);
    const __m128i by64 = _mm_set_epi64x(0x1c6e41596, 0x154442bd4), by16 = _mm_set_epi64x(0x0ccaa009e, 0x1751997d0);
    auto load = [](const u8* p) PCLMUL { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); };
    __m128i a = _mm_xor_si128(load(data), _mm_cvtsi32_si128(static_cast<int>(crc)));
    __m128i b = load(data + 16), c = load(data + 32), d = load(data + 48);
    for (data += 64, size -= 64; size >= 64; data += 64, size -= 64) {
        a = fold(a, load(data), by64);
        b = fold(b, load(data + 16), by64);
        c = fold(c, load(data + 32), by64);
        d = fold(d, load(data + 48), by64);
    }
    a = fold(fold(fold(a, b, by16), c, by16), d, by16);
    for (; size >= 16; data += 16, size -= 16) a = fold(a, load(data), by16);
    // What is left are 128 bits with the same remainder: the table takes them as sixteen bytes of a fresh register.
    alignas(16) u8 rest[16];
    _mm_store_si128(reinterpret_cast<__m128i*>(rest), a);
    return crc_by_table(crc_by_table(0, rest, 16), data, size);
}

static bool can_fold() {
    static const bool can = __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1");
    return can;
}
#endif

#ifdef HAS_VPCLMUL
// The same, four times as wide. The keys are x^(2048 + 32) and x^(2048 - 32) as the paper makes them for x^(512 +- 32).
#define VPCLMUL __attribute__((target("vpclmulqdq,avx512f,pclmul,sse4.1")))

VPCLMUL static inline __m512i fold4(__m512i state, __m512i next, __m512i keys) {
    __m512i low = _mm512_clmulepi64_epi128(state, keys, 0x00), high = _mm512_clmulepi64_epi128(state, keys, 0x11);
    return _mm512_ternarylogic_epi64(low, high, next, 0x96);
}

VPCLMUL static inline __m512i load4(const u8* p) { return _mm512_loadu_si512(p); }

VPCLMUL static inline __m512i keys4(i64 high, i64 low) {
    return _mm512_set_epi64(high, low, high, low, high, low, high, low);
}

VPCLMUL static u32 crc_by_wide_folding(u32 crc, const u8* data, size_t size) {
    if (size < 256) return crc_by_folding(crc, data, size);
    const __m512i by256 = keys4(0x1322d1430, 0x11542778a), by64 = keys4(0x1c6e41596, 0x154442bd4);
    const __m128i by16 = _mm_set_epi64x(0x0ccaa009e, 0x1751997d0);
    __m512i first = _mm512_zextsi128_si512(_mm_cvtsi32_si128(static_cast<int>(crc)));
    __m512i a = _mm512_xor_si512(load4(data), first), b = load4(data + 64), c = load4(data + 128), d = load4(data + 192);
    for (data += 256, size -= 256; size >= 256; data += 256, size -= 256) {
        a = fold4(a, load4(data), by256);
        b = fold4(b, load4(data + 64), by256);
        c = fold4(c, load4(data + 128), by256);
        d = fold4(d, load4(data + 192), by256);
    }
    a = fold4(fold4(fold4(a, b, by64), c, by64), d, by64);
    for (; size >= 64; data += 64, size -= 64) a = fold4(a, load4(data), by64);
    __m128i rest = _mm512_extracti32x4_epi32(a, 0);
    rest = fold(rest, _mm512_extracti32x4_epi32(a, 1), by16);
    rest = fold(rest, _mm512_extracti32x4_epi32(a, 2), by16);
    rest = fold(rest, _mm512_extracti32x4_epi32(a, 3), by16);
    alignas(16) u8 bytes[16];
    _mm_store_si128(reinterpret_cast<__m128i*>(bytes), rest);
    return crc_by_folding(crc_by_table(0, bytes, 16), data, size);
}

static bool can_fold_wide() {
    static const bool can = can_fold() && __builtin_cpu_supports("vpclmulqdq") && __builtin_cpu_supports("avx512f");
    return can;
}
#endif

static u32 crc_of(u32 crc, const u8* data, size_t size) {
    crc = ~crc;
#ifdef HAS_VPCLMUL
    if (can_fold_wide()) return ~crc_by_wide_folding(crc, data, size);
#endif
#ifdef HAS_PCLMUL
    if (can_fold()) return ~crc_by_folding(crc, data, size);
#endif
    return ~crc_by_table(crc, data, size);
}

static u32 multiply(u32 a, u32 b) {  // of polynomials, modulo POLYNOMIAL
    u32 product = 0;
    for (int bit = 31; bit >= 0; bit--) {
        if (a >> bit & 1) product ^= b;
        b = b & 1 ? (b >> 1) ^ POLYNOMIAL : b >> 1;
    }
    return product;
}

// Appending n zero bytes multiplies by x^(8n); x^0 is the highest bit.
static u32 power_of(u64 num_bytes) {
    u32 power = 1u << 31, factor = 1u << 23;
    for (; num_bytes; num_bytes >>= 1, factor = multiply(factor, factor))
        if (num_bytes & 1) power = multiply(power, factor);
    return power;
}

static u32 crc32_join(u32 first, u32 second, u64 second_length) {
    return multiply(power_of(second_length), first) ^ second;
}

// -- files ------------------------------------------------------------------------------------------------------------

static constexpr size_t BLOCK = 4096;        // what O_DIRECT asks of addresses, offsets and lengths
static constexpr size_t BUFFER = 4u << 20;   // what is written at once
static constexpr size_t STRETCH = 128u << 10;  // what is digested and summed while it is in the cache
static constexpr size_t LARGE = 64u << 10;  // a run that is worth a read and a CRC of its own
static constexpr size_t SMALL = 128u << 10;  // a file that is not worth waiting for the disk: flushed with the others
static constexpr size_t MAX_WINDOW = 256u << 10, MIN_WINDOW = 4096, ALL_WINDOWS = 16u << 20;

struct FileError : std::runtime_error {
    int code;
    explicit FileError(int code) : std::runtime_error(std::strerror(code)), code(code) {}
};

struct ShortRead : std::runtime_error {
    i64 file;
    explicit ShortRead(i64 file) : std::runtime_error("a file ends before what it should hold"), file(file) {}
};

static void read_whole(int handle, i64 file, u8* to, size_t size, i64 position) {
    while (size) {
        ssize_t count = pread(handle, to, size, position);
        if (count < 0 && errno == EINTR) continue;
        if (count < 0) throw FileError(errno);
        if (count == 0) throw ShortRead(file);
        to += count;
        size -= count;
        position += count;
    }
}

struct Freed {
    void operator()(u8* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<u8, Freed>;

static Memory aligned(size_t size) {
    void* memory = nullptr;
    if (posix_memalign(&memory, BLOCK, size)) throw std::bad_alloc();
    return Memory(static_cast<u8*>(memory));
}

// A buffer, used for one file after the other: memory that was touched once costs nothing again.
class Buffer {
  public:
    Buffer() {
        std::lock_guard<std::mutex> lock(mutex());
        if (spare().empty()) {
            memory_ = aligned(BUFFER);
            return;
        }
        memory_ = std::move(spare().back());
        spare().pop_back();
    }
    ~Buffer() {
        std::lock_guard<std::mutex> lock(mutex());
        if (spare().size() < 16) spare().push_back(std::move(memory_));
    }
    Buffer(const Buffer&) = delete;
    u8* get() const { return memory_.get(); }

  private:
    // Never destroyed: threads may end after static objects.
    static std::mutex& mutex() {
        static auto* mutex = new std::mutex;
        return *mutex;
    }
    static std::vector<Memory>& spare() {
        static auto* spare = new std::vector<Memory>;
        return *spare;
    }
    Memory memory_;
};

// Small runs out of one source file: what lies around them is read at once.
struct Window {
    std::vector<u8> bytes;
    i64 start = 0;
    size_t held = 0;

    void copy(int handle, i64 file, u8* to, size_t size, i64 position, size_t most) {
        if (position < start || position + static_cast<i64>(size) > start + static_cast<i64>(held)) {
            if (bytes.size() < most) bytes.resize(most);
            held = 0;
            start = position;
            while (held < most) {  // the end of the file may come before the end of the window
                ssize_t count = pread(handle, bytes.data() + held, most - held, position + held);
                if (count < 0 && errno == EINTR) continue;
                if (count < 0) throw FileError(errno);
                if (count == 0) break;
                held += count;
            }
            if (held < size) throw ShortRead(file);
        }
        std::memcpy(to, bytes.data() + (position - start), size);
    }
};

// A file that is written front to back through an aligned buffer. Past the page cache where the file system lets us
// (half of the processor's time of a buffered write); where not, the kernel is asked to begin writing at once.
class Writer {
  public:
    explicit Writer(const std::string& path) {
        py::gil_scoped_release release;
#ifdef O_DIRECT
        handle_ = open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_DIRECT, 0666);
        is_direct_ = handle_ >= 0;
        if (handle_ < 0 && errno == EINVAL)
#endif
            handle_ = open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
        if (handle_ < 0) throw FileError(errno);
    }
    ~Writer() { abandon(); }
    Writer(const Writer&) = delete;

    i64 position() const { return written_ + static_cast<i64>(filled_); }

    void write(py::buffer content) {
        py::buffer_info info = content.request();
        py::gil_scoped_release release;
        append(static_cast<const u8*>(info.ptr), static_cast<size_t>(info.size * info.itemsize));
    }

    // Overwrites bytes that were written before, now or when the file is closed.
    void patch(i64 position, const std::string& content) {
        if (position < 0 || position + static_cast<i64>(content.size()) > this->position())
            throw std::out_of_range("a patch leaves the file");
        if (position >= written_) {
            std::memcpy(buffer_.get() + (position - written_), content.data(), content.size());
            return;
        }
        patches_.emplace_back(position, content);
    }

    // Appends values in the order of `rows`, int64 (source file, first byte there, bytes): the next ones of a tensor,
    // from its element `index`. Returns (lane0, lane1, CRC-32 that goes on from `crc`); `crcs` become the rows' own, -1
    // of rows that are not large, which are summed several at a time.
    std::tuple<u64, u64, u32> gather(const std::vector<int>& handles, std::uintptr_t rows_address, i64 num_rows,
                                     std::uintptr_t crcs_address, u64 index, u64 seed0, u64 seed1, u32 crc) {
        py::gil_scoped_release release;
        static const u32 power_of_stretch = power_of(STRETCH);
        const i64* rows = reinterpret_cast<const i64*>(rows_address);
        i64* crcs = reinterpret_cast<i64*>(crcs_address);
        std::vector<Window> windows(handles.size());
        size_t window = ALL_WINDOWS / (handles.size() ? handles.size() : 1);
        window = window > MAX_WINDOW ? MAX_WINDOW : window < MIN_WINDOW ? MIN_WINDOW : window;
        u64 lanes[2] = {0, 0};
        size_t fresh = 0;  // bytes at the end of the buffer that are not yet digested
        u32 crc_of_row = 0;
        auto digest = [&] {
            const u8* from = buffer_.get() + filled_ - fresh;
            if (reinterpret_cast<std::uintptr_t>(from) % 4 || fresh % 4) throw std::logic_error("values out of step");
            digest_values(reinterpret_cast<const u32*>(from), fresh / 4, index, seed0, seed1, lanes);
            u32 own = crc_of(0, from, fresh), power = fresh == STRETCH ? power_of_stretch : power_of(fresh);
            crc = multiply(power, crc) ^ own;
            crc_of_row = multiply(power, crc_of_row) ^ own;
            index += fresh / 4;
            fresh = 0;
        };
        for (i64 r = 0; r < num_rows; r++, rows += 3) {
            i64 file = rows[0], from = rows[1], left = rows[2];
            if (file < 0 || file >= static_cast<i64>(handles.size()) || from < 0 || left < 0)
                throw std::out_of_range("a run leaves its tensor");
            bool is_large = left >= static_cast<i64>(LARGE);
            if (is_large && fresh) digest();
            crc_of_row = 0;
            while (left > 0) {
                size_t count = std::min<size_t>(left, std::min(STRETCH - fresh, BUFFER - filled_));
                u8* to = buffer_.get() + filled_;
                if (is_large)
                    read_whole(handles[file], file, to, count, from);
                else
                    windows[file].copy(handles[file], file, to, count, from, window);
                filled_ += count;
                fresh += count;
                from += count;
                left -= count;
                if (fresh == STRETCH || filled_ == BUFFER) digest();
                if (filled_ == BUFFER) flush(BUFFER);
            }
            if (is_large && fresh) digest();
            crcs[r] = is_large ? static_cast<i64>(crc_of_row) : -1;
        }
        if (fresh) digest();
        return {lanes[0], lanes[1], crc};
    }

    // What is left goes out; the file is as long as what was written. Its size.
    i64 close() {
        py::gil_scoped_release release;
        i64 size = position();
        apply_early_patches();
        if (filled_) {
            if (!written_ && filled_ < SMALL) leave_direct();
            size_t padded = is_direct_ ? (filled_ + BLOCK - 1) / BLOCK * BLOCK : filled_;
            bool is_padded = padded != filled_;
            std::memset(buffer_.get() + filled_, 0, padded - filled_);
            flush(padded);
            if (is_padded && ftruncate(handle_, size)) throw FileError(errno);
        }
        if (!patches_.empty()) {
            leave_direct();
            for (const auto& [position, content] : patches_)
                put(reinterpret_cast<const u8*>(content.data()), content.size(), position);
        }
        int handle = handle_;
        handle_ = -1;
        if (::close(handle)) throw FileError(errno);
        return size;
    }

    void abandon() {
        if (handle_ >= 0) ::close(handle_);
        handle_ = -1;
    }

  private:
    void append(const u8* content, size_t size) {
        while (size) {
            size_t count = std::min(size, BUFFER - filled_);
            std::memcpy(buffer_.get() + filled_, content, count);
            filled_ += count;
            content += count;
            size -= count;
            if (filled_ == BUFFER) flush(BUFFER);
        }
    }

    void flush(size_t size) {
        if (handle_ < 0) throw std::logic_error("the file is closed");
        if (written_ == 0) first_.assign(buffer_.get(), buffer_.get() + std::min(size, BLOCK));
        put(buffer_.get(), size, written_);
#ifdef SYNC_FILE_RANGE_WRITE
        if (!is_direct_) sync_file_range(handle_, written_, size, SYNC_FILE_RANGE_WRITE);
#endif
        written_ += size;
        filled_ = 0;
    }

    void put(const u8* from, size_t size, i64 position) {
        while (size) {
            ssize_t count = pwrite(handle_, from, size, position);
            if (count < 0 && errno == EINTR) continue;
            if (count < 0 && errno == EINVAL && is_direct_) {  // this file system has opened it so, and will not write
                leave_direct();
                continue;
            }
            if (count < 0) throw FileError(errno);
            from += count;
            size -= count;
            position += count;
            if (size && is_direct_ && count % BLOCK) leave_direct();  // the disk is about to be full
        }
    }

    // Patches of the first block, where the header of a file with one tensor is: from memory, without reading it again.
    void apply_early_patches() {
        if (first_.size() < BLOCK) return;
        std::vector<std::pair<i64, std::string>> others;
        bool is_changed = false;
        for (auto& patch : patches_) {
            if (patch.first + patch.second.size() > BLOCK) {
                others.push_back(std::move(patch));
                continue;
            }
            std::memcpy(first_.data() + patch.first, patch.second.data(), patch.second.size());
            is_changed = true;
        }
        patches_ = std::move(others);
        if (!is_changed) return;
        Memory block = aligned(BLOCK);
        std::memcpy(block.get(), first_.data(), BLOCK);
        put(block.get(), BLOCK, 0);
    }

    void leave_direct() {
#ifdef O_DIRECT
        if (is_direct_) fcntl(handle_, F_SETFL, fcntl(handle_, F_GETFL) & ~O_DIRECT);
#endif
        is_direct_ = false;
    }

    Buffer buffer_;
    int handle_ = -1;
    bool is_direct_ = false;
    size_t filled_ = 0;
    i64 written_ = 0;
    std::vector<u8> first_;
    std::vector<std::pair<i64, std::string>> patches_;
};

// (bytes, CRC-32) of what an open file holds from its beginning. `known`: int64 (start, bytes, CRC-32) of stretches that
// need not be read again, in order, not overlapping.
static std::pair<i64, u32> checksum(int handle, std::uintptr_t known_address, i64 num_known) {
    py::gil_scoped_release release;
    const i64* known = reinterpret_cast<const i64*>(known_address);
    const i64* end = known + 3 * num_known;
    Buffer buffer;
    u32 crc = 0;
    i64 size = 0;
    while (true) {
        i64 most = 2 * STRETCH;
        if (known != end) {
            if (known[0] < size || known[1] < 0) throw std::out_of_range("known stretches overlap");
            if (known[0] == size) {
                crc = crc32_join(crc, static_cast<u32>(known[2]), known[1]);
                size += known[1];
                known += 3;
                continue;
            }
            most = std::min<i64>(most, known[0] - size);
        }
        ssize_t count = pread(handle, buffer.get(), most, size);
        if (count < 0 && errno == EINTR) continue;
        if (count < 0) throw FileError(errno);
        if (count == 0) return {size, crc};
        crc = crc_of(crc, buffer.get(), count);
        size += count;
    }
}

static u32 crc32(py::buffer content, u32 crc) {
    py::buffer_info info = content.request();
    py::gil_scoped_release release;
    return crc_of(crc, static_cast<const u8*>(info.ptr), static_cast<size_t>(info.size * info.itemsize));
}

static u32 crc32_by_table(py::buffer content, u32 crc) {
    py::buffer_info info = content.request();
    return ~crc_by_table(~crc, static_cast<const u8*>(info.ptr), static_cast<size_t>(info.size * info.itemsize));
}

static u32 crc32_by_folding(py::buffer content, u32 crc) {
#ifdef HAS_PCLMUL
    py::buffer_info info = content.request();
    if (can_fold())
        return ~crc_by_folding(~crc, static_cast<const u8*>(info.ptr), static_cast<size_t>(info.size * info.itemsize));
#endif
    return crc32_by_table(content, crc);
}

PYBIND11_MODULE(_kernel, m) {
    m.doc() = "Inner loops of megatron.ucp; addresses are those of contiguous host memory.";
    m.attr("VERSION") = 2;  // native.py asks for it
    py::register_exception_translator([](std::exception_ptr raised) {
        try {
            if (raised) std::rethrow_exception(raised);
        } catch (const FileError& error) {
            errno = error.code;
            PyErr_SetFromErrno(PyExc_OSError);
        } catch (const ShortRead& error) {
            PyErr_SetObject(PyExc_EOFError, py::int_(error.file).ptr());
        }
    });
    m.def("digest_runs", &digest_runs, py::arg("values_address"), py::arg("values_numel"), py::arg("runs_address"),
          py::arg("num_runs"), py::arg("seed0"), py::arg("seed1"));
    m.def("copy_runs", &copy_runs, py::arg("target_address"), py::arg("target_numel"), py::arg("source_address"),
          py::arg("source_numel"), py::arg("element_size"), py::arg("runs_address"), py::arg("num_runs"));
#ifdef HAS_PCLMUL
    m.attr("folds_crc32") = can_fold();
#else
    m.attr("folds_crc32") = false;
#endif
    m.def("crc32", &crc32, py::arg("content"), py::arg("crc") = 0);
    m.def("crc32_by_folding", &crc32_by_folding, "Where it folds no more than 16 bytes at once.", py::arg("content"),
          py::arg("crc") = 0);
    m.def("crc32_by_table", &crc32_by_table, "Where the processor cannot fold.", py::arg("content"), py::arg("crc") = 0);
    m.def("crc32_join", &crc32_join, py::arg("first"), py::arg("second"), py::arg("second_length"));
    m.def("checksum", &checksum, py::arg("handle"), py::arg("known_address") = 0, py::arg("num_known") = 0);
    py::class_<Writer>(m, "Writer")
        .def(py::init<const std::string&>(), py::arg("path"))
        .def_property_readonly("position", &Writer::position)
        .def("write", &Writer::write, py::arg("content"))
        .def("patch", &Writer::patch, py::arg("position"), py::arg("content"))
        .def("gather", &Writer::gather, py::arg("handles"), py::arg("rows_address"), py::arg("num_rows"),
             py::arg("crcs_address"), py::arg("index"), py::arg("seed0"), py::arg("seed1"), py::arg("crc"))
        .def("close", &Writer::close)
        .def("abandon", &Writer::abandon);
}
