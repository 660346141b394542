// SPDX-License-Identifier: Apache-2.0
// Safetensors files made to mislead: lengths, offsets, shapes and depths that lie. Each is refused with a text within
// 10 MB of memory and 10 ms (more is allowed on a busy machine), from memory and from a file, and nothing changes.
#include "support/allocation_counter.hpp"
#include "support/check_error.hpp"

#include <restkv/interop/safetensors_writer.hpp>

#include <chrono>
#include <filesystem>
#include <fstream>
#include <functional>

using restkv::errc;
using restkv::safetensors_file;
using restkv::safetensors_view;
using restkv::status;

namespace {

using bytes = std::vector<std::byte>;

/// A file with a header and `data` bytes behind it; the length before the header may lie.
bytes file_of(const std::string& header, std::size_t data = 0, std::uint64_t length = UINT64_MAX) {
  if (length == UINT64_MAX) length = header.size();
  bytes file(8 + header.size() + data);
  std::memcpy(file.data(), &length, 8);
  std::memcpy(file.data() + 8, header.data(), header.size());
  return file;
}

std::string tensor(const std::string& name, const std::string& shape, const std::string& offsets,
                   const std::string& dtype = "F32") {
  return "\"" + name + "\":{\"dtype\":\"" + dtype + "\",\"shape\":[" + shape + "],\"data_offsets\":[" + offsets + "]}";
}

std::string repeated(const std::string& text, int times) {
  std::string all;
  for (int i = 0; i < times; ++i) all += text;
  return all;
}

struct hostile_file {
  const char* what;
  bytes content;
};

std::vector<hostile_file> hostile_files() {
  const std::string good = tensor("a", "2", "0,8");
  std::string many_axes = "1";
  for (int i = 0; i < 100000; ++i) many_axes += ",1";
  std::string same_names = "{" + good;
  for (int i = 0; i < 4000; ++i) same_names += "," + good;
  std::string metadata = "{\"__metadata__\":{\"\":\"\"";
  for (int i = 0; i < 4000; ++i) metadata += ",\"\":\"\"";
  return {
      {"nothing", {}},
      {"no header", bytes(8)},
      {"a header of 2^64 - 1 bytes", file_of("{}", 0, UINT64_MAX - 1)},
      {"a header of 2^63 bytes", file_of("{}", 0, std::uint64_t(1) << 63)},
      {"a header of 2^40 bytes", file_of("{}", 0, std::uint64_t(1) << 40)},
      {"a header longer than the file", file_of("{}", 100, 103)},
      {"a header that ends too early", file_of("{" + good + "}", 8, 10)},
      {"offsets outside the file", file_of("{" + tensor("a", "4", "0,16") + "}", 8)},
      {"offsets of 2^64 - 1", file_of("{" + tensor("a", "2", "18446744073709551608,18446744073709551615") + "}", 8)},
      {"offsets beyond 64 bits", file_of("{" + tensor("a", "2", "0,36893488147419103232") + "}", 8)},
      {"offsets backwards", file_of("{" + tensor("a", "2", "8,0") + "}", 8)},
      {"negative offsets", file_of("{" + tensor("a", "2", "-8,0") + "}", 8)},
      {"a shape larger than its bytes", file_of("{" + tensor("a", "3", "0,8") + "}", 8)},
      {"tensors on the same bytes", file_of("{" + good + "," + tensor("b", "2", "0,8") + "}", 8)},
      {"tensors that overlap", file_of("{" + good + "," + tensor("b", "2", "4,12") + "}", 12)},
      {"a hole between tensors", file_of("{" + good + "," + tensor("b", "2", "12,20") + "}", 20)},
      {"bytes behind the last tensor", file_of("{" + good + "}", 9)},
      {"2^40 elements", file_of("{" + tensor("a", "1099511627776", "0,8") + "}", 8)},
      {"2^40 by 2^40 elements", file_of("{" + tensor("a", "1099511627776,1099511627776", "0,0") + "}", 0)},
      {"2^32 by 2^32 elements, a product of 0", file_of("{" + tensor("a", "4294967296,4294967296", "0,0") + "}", 0)},
      {"2^62 doubles", file_of("{" + tensor("a", "4611686018427387904", "0,0", "F64") + "}", 0)},
      {"2^63 - 1 rows of 0", file_of("{" + tensor("a", "9223372036854775807,9223372036854775807,0", "0,0") + "}", 0)},
      {"an extent of 2^64", file_of("{" + tensor("a", "18446744073709551616", "0,8") + "}", 8)},
      {"a negative extent", file_of("{" + tensor("a", "-2", "0,8") + "}", 8)},
      {"an extent of 1e300", file_of("{" + tensor("a", "1e300", "0,8") + "}", 8)},
      {"100,000 axes", file_of("{" + tensor("a", many_axes, "0,4") + "}", 4)},
      {"an unknown dtype", file_of("{" + tensor("a", "2", "0,8", "F128") + "}", 8)},
      {"4,000 tensors of one name", file_of(same_names + "}", 8)},
      {"4,000 texts under one key", file_of(metadata + "}}")},
      {"a megabyte of '['", file_of(repeated("[", 1 << 20))},
      {"a megabyte of '{'", file_of(repeated("{", 1 << 20))},
      {"a million nested objects", file_of(repeated("{\"a\":", 1 << 20))},
      {"a nested shape", file_of("{" + tensor("a", repeated("[", 1 << 18), "0,8") + "}", 8)},
      {"nested metadata", file_of("{\"__metadata__\":{\"a\":" + repeated("{\"a\":", 1 << 18))},
      {"a text of 256 KiB that does not end", file_of("{\"" + repeated("a", 1 << 18))},
      {"a name that is not UTF-8", file_of("{" + tensor("\xff\xfe", "2", "0,8") + "}", 8)},
      {"a zero byte in the header", file_of(std::string("{\0}", 3))},
  };
}

/// Runs `body`, which must fail with errc::bad_file, within 10 MB.
void check_refused(const std::string& what, const std::function<status()>& body, double& slowest) {
  status outcome;
  const auto start = std::chrono::steady_clock::now();
  const long most = restkv_test::most_bytes_of([&] { outcome = body(); });
  const std::chrono::duration<double, std::milli> took = std::chrono::steady_clock::now() - start;
  slowest = std::max(slowest, took.count());
  INFO(what << ": " << outcome.message() << "; " << took.count() << " ms, " << most << " bytes");
  CHECK(outcome.code() == errc::bad_file);
  CHECK(outcome.message()[0] != '\0');
  CHECK(most < 10'000'000);
  CHECK(took.count() < 500);  // 10 where nothing else runs: printed below
}

class scratch_file {
 public:
  scratch_file()
      : path_((std::filesystem::temp_directory_path() / ("restkv_hostile_" + std::to_string(getpid()))).string()) {}
  scratch_file(const scratch_file&) = delete;
  scratch_file& operator=(const scratch_file&) = delete;
  ~scratch_file() { std::remove(path_.c_str()); }
  const std::string& holding(std::span<const std::byte> content) const {
    std::ofstream(path_, std::ios::binary)
        .write(reinterpret_cast<const char*>(content.data()), static_cast<std::streamsize>(content.size()));
    return path_;
  }
  [[nodiscard]] const std::string& path() const { return path_; }

 private:
  std::string path_;
};

bytes good_file() { return file_of("{" + tensor("a", "2", "0,8") + "}", 8); }

}  // namespace

TEST_CASE("hostile files are refused at once") {
  const scratch_file scratch;
  safetensors_view kept_view;
  safetensors_file kept_file;
  const bytes good = good_file();
  REQUIRE(safetensors_view::parse(good, kept_view).ok());
  REQUIRE(safetensors_file::open(scratch.holding(good), kept_file).ok());
  double slowest = 0;
  for (const hostile_file& file : hostile_files()) {
    check_refused(
        file.what, [&] { return safetensors_view::parse(file.content, kept_view); }, slowest);
    const std::string path = scratch.holding(file.content);
    check_refused(
        file.what, [&] { return safetensors_file::open(path, kept_file); }, slowest);
  }
  WARN("the slowest refusal took " << slowest << " ms");
  const safetensors_view* const kept[] = {&kept_view, &kept_file};
  for (const safetensors_view* const view : kept) {
    REQUIRE(view->entries().size() == 1);
    CHECK(view->bytes(view->entries()[0]).size() == 8);
    CHECK(view->find("a") != nullptr);
  }
}

TEST_CASE("a file of 2^40 bytes, almost all of them a hole, costs no more than its header") {
  const scratch_file scratch;
  double slowest = 0;
  safetensors_file file;
  for (const std::string& header : {std::string(), "{" + tensor("a", "2", "0,8") + "}", std::string("{")}) {
    const std::uint64_t length = header == "{" ? 100'000'000 : header.size();
    scratch.holding(file_of(header, 0, length));
    std::error_code trouble;
    std::filesystem::resize_file(scratch.path(), std::uintmax_t(1) << 40, trouble);
    if (trouble) SKIP("the file system has no files of 2^40 bytes");
    check_refused(
        "sparse", [&] { return safetensors_file::open(scratch.path(), file); }, slowest);
  }
  // One that is what it says: there is no memory for it, which is an error too.
  scratch.holding(file_of(
      "{" + tensor("a", std::to_string((std::size_t(1) << 43) / 4), "0," + std::to_string(std::size_t(1) << 43)) +
      "}"));
  std::error_code trouble;
  std::filesystem::resize_file(scratch.path(), std::filesystem::file_size(scratch.path()) + (std::uintmax_t(1) << 43),
                               trouble);
  if (trouble) SKIP("the file system has no files of 2^43 bytes");
  const status outcome = safetensors_file::open(scratch.path(), file);
  INFO(outcome.message());
  CHECK(outcome.code() == errc::out_of_memory);
}

TEST_CASE("a file of another shape than its bytes is not written") {
  const scratch_file scratch;
  restkv::safetensors_writer writer;
  for (const std::vector<restkv::index_t>& shape :
       {std::vector<restkv::index_t>{3}, {-2, -1}, {restkv::index_t(1) << 40, restkv::index_t(1) << 40}, {INT64_MAX}}) {
    writer.add("a", restkv::safetensors_dtype::f32, shape, bytes(8));
    CHECK(writer.write(scratch.path()).code() == errc::invalid_argument);
    CHECK_FALSE(std::filesystem::exists(scratch.path()));
  }
  writer.add("a", restkv::safetensors_dtype::f32, {2, 1}, bytes(8));
  CHECK(writer.write(scratch.path()).ok());
}
