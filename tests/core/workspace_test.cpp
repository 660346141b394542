// SPDX-License-Identifier: Apache-2.0
#include "support/check_error.hpp"
#include "support/random.hpp"

#include <restkv/core/workspace.hpp>

#include <cstring>
#include <limits>
#include <type_traits>

using namespace restkv_test;
using restkv::errc;
using restkv::workspace;

namespace {

struct odd_size {
  unsigned char bytes[3];
};
struct alignas(32) wide {
  double numbers[4];
};

struct piece {
  unsigned char* begin = nullptr;
  std::size_t bytes = 0;
};

/// Takes random pieces, the same ones for the same seed.
std::vector<piece> take_pieces(unsigned seed, workspace& space) {
  random_engine random(seed);
  std::vector<piece> pieces;
  const auto take = [&]<class T>(std::type_identity<T>, index_t count) {
    pieces.push_back({reinterpret_cast<unsigned char*>(space.take<T>(count)),
                      static_cast<std::size_t>(count) * sizeof(T)});
  };
  for (index_t i = pick(random, 0, 12); i > 0; --i) {
    const index_t count = chance(random, 20) ? 0 : pick(random, 1, 200);
    switch (pick(random, 0, 4)) {
      case 0: take(std::type_identity<char>{}, count); break;
      case 1: take(std::type_identity<odd_size>{}, count); break;
      case 2: take(std::type_identity<float>{}, count); break;
      case 3: take(std::type_identity<wide>{}, count); break;
      default: take(std::type_identity<double>{}, count); break;
    }
  }
  return pieces;
}

}  // namespace

TEST_CASE("what a counting workspace asks for is enough wherever the buffer starts") {
  for (unsigned seed = 0; seed < 300; ++seed) {
    workspace counting;
    for (const piece& p : take_pieces(seed, counting)) CHECK(p.begin == nullptr);
    REQUIRE(counting.check().ok());
    CHECK(counting.counting());
    const std::size_t needed = counting.required_bytes();
    std::vector<unsigned char> memory(needed + 2 * workspace::alignment, 0xaa);
    const std::size_t start = seed % (workspace::alignment + 1);
    workspace real(memory.data() + start, needed);
    const auto pieces = take_pieces(seed, real);
    CAPTURE(seed, needed, start);
    REQUIRE(real.check().ok());
    CHECK_FALSE(real.counting());
    CHECK(real.used() == counting.used());
    // Aligned, inside, one behind the other; filling them leaves the rest of the memory alone.
    const unsigned char* end = memory.data() + start;
    for (const piece& p : pieces) {
      CHECK((p.begin == nullptr) == (p.bytes == 0));
      if (p.bytes == 0) continue;
      CHECK(reinterpret_cast<std::uintptr_t>(p.begin) % workspace::alignment == 0);
      CHECK(p.begin >= end);
      end = p.begin + p.bytes;
      std::memset(p.begin, 0x55, p.bytes);
    }
    CHECK(end <= memory.data() + start + needed);
    for (std::size_t i = 0; i < start; ++i) CHECK(memory[i] == 0xaa);
    for (std::size_t i = start + needed; i < memory.size(); ++i) CHECK(memory[i] == 0xaa);
  }
}

TEST_CASE("a buffer that is too small is said to be, with both sizes, and no piece passes its end") {
  for (unsigned seed = 0; seed < 200; ++seed) {
    workspace counting;
    take_pieces(seed, counting);
    if (counting.required_bytes() == 0) continue;
    random_engine random(seed);
    std::vector<unsigned char> memory(counting.required_bytes() + workspace::alignment);
    const auto start = static_cast<std::size_t>(pick(random, 0, 63));
    // Less than the pieces themselves take, alignment of the beginning apart.
    const auto bytes = static_cast<std::size_t>(pick(random, 0, static_cast<index_t>(counting.used()) - 1));
    workspace small_one(memory.data() + start, bytes);
    bool ended = false;
    for (const piece& p : take_pieces(seed, small_one)) {
      if (p.bytes == 0) continue;
      CHECK((p.begin == nullptr || p.begin + p.bytes <= memory.data() + start + bytes));
      CHECK((!ended || p.begin == nullptr));  // once a piece did not fit, none does
      ended = ended || p.begin == nullptr;
    }
    CHECK(ended);
    check_error(small_one.check(), errc::workspace_too_small,
                {static_cast<index_t>(bytes), static_cast<index_t>(counting.required_bytes())});
  }
}

TEST_CASE("nothing needs no memory, and no memory holds nothing") {
  workspace counting;
  CHECK(counting.take<float>(0) == nullptr);
  CHECK(counting.required_bytes() == 0);
  CHECK(counting.check().ok());
  alignas(64) unsigned char memory[128];
  workspace off_by_one(memory + 1, 0);
  CHECK(off_by_one.take<float>(0) == nullptr);
  CHECK(off_by_one.check().ok());
  workspace none(nullptr, 0);
  CHECK(none.take<float>(0) == nullptr);
  CHECK(none.check().ok());
  CHECK(none.take<float>(1) == nullptr);
  CHECK(none.check().code() == errc::workspace_too_small);
}

TEST_CASE("a null pointer is a buffer of no bytes, whatever its size is said to be") {
  workspace space(nullptr, 1000);
  CHECK(space.take<float>(3) == nullptr);
  CHECK(space.take<float>(3) == nullptr);
  check_error(space.check(), errc::workspace_too_small, {0}, "null");
}

TEST_CASE("sizes that overflow are refused, not wrapped around") {
  constexpr index_t most = std::numeric_limits<index_t>::max();
  alignas(64) unsigned char memory[256];
  for (const bool counting : {true, false}) {
    const auto make = [&] { return counting ? workspace() : workspace(memory, sizeof memory); };
    CAPTURE(counting);
    workspace product = make();
    CHECK(product.take<double>(most) == nullptr);
    CHECK(product.check().code() == errc::invalid_argument);
    CHECK(product.take<char>(1) == nullptr);
    workspace sum = make();
    CHECK(sum.take<char>(most) == nullptr);
    CHECK(sum.take<char>(most) == nullptr);
    CHECK(sum.take<char>(most) == nullptr);
    CHECK_FALSE(sum.check().ok());
    workspace negative = make();
    CHECK(negative.take<char>(-1) == nullptr);
    CHECK(negative.check().code() == errc::invalid_argument);
  }
}

TEST_CASE("a span of bytes is a buffer") {
  std::vector<std::byte> bytes(300);
  workspace space{std::span<std::byte>(bytes)};
  auto* const first = space.take<int>(10);
  REQUIRE(first != nullptr);
  CHECK(reinterpret_cast<std::byte*>(first) >= bytes.data());
  CHECK(reinterpret_cast<std::byte*>(first + 10) <= bytes.data() + bytes.size());
  CHECK(space.check().ok());
}
