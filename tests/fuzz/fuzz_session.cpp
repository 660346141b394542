// SPDX-License-Identifier: Apache-2.0
// Any sequence of calls leaves a session under its mark with positions that ascend; a call that fails changes nothing;
// patched archives are refused, or are sessions that write the very same bytes.
#include <restkv/reference/backend.hpp>
#include <restkv/score/observed_attention.hpp>
#include <restkv/session/session_archive.hpp>

#include <array>
#include <bit>
#include <cstdlib>
#include <vector>

namespace {

using restkv::index_t;
using restkv::status;
using policy_type = restkv::session_policy<
    restkv::eviction_policy<restkv::observed_attention, restkv::mean, restkv::no_pool, restkv::ada_kv>,
    restkv::any_running>;
using session_type = restkv::session<restkv::reference_backend, policy_type, restkv::half>;

constexpr index_t head_dim = 2;

void require(bool condition) {
  if (!condition) std::abort();
}

/// Hands out the input; zeros behind its end.
class reader {
 public:
  reader(const std::uint8_t* data, std::size_t size) : data_(data), size_(size) {}
  [[nodiscard]] bool empty() const { return at_ >= size_; }
  index_t byte() { return at_ < size_ ? data_[at_++] : 0; }
  index_t pick(index_t low, index_t high) { return low + byte() % (high - low + 1); }
  restkv::half element() { return restkv::half::from_bits(static_cast<std::uint16_t>(byte() << 8 | byte())); }

 private:
  const std::uint8_t* data_;
  std::size_t size_;
  std::size_t at_ = 0;
};

std::vector<std::byte> bytes_of(const session_type& session) {
  std::vector<std::byte> bytes(restkv::serialised_bytes(session));
  std::size_t written = 0;
  require(restkv::serialise(session, bytes, written).ok() && written == bytes.size());
  return bytes;
}

void check(const session_type& session) {
  const auto& plan = session.plan_of();
  for (index_t l = 0; l < session.layers(); ++l) {
    index_t total = 0;
    for (index_t h = 0; h < plan.shape.kv_heads; ++h) {
      const auto positions = session.positions(l, h);
      total += static_cast<index_t>(positions.size()) - session.speculated(l);
      for (std::size_t i = 0; i < positions.size(); ++i) {
        require(positions[i] > (i == 0 ? -1 : positions[i - 1]));
        require(positions[i] < session.tokens_seen(l) + session.speculated(l));
      }
    }
    require(total <= plan.policy.high_water * plan.shape.kv_heads);
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  reader input(data, size);
  policy_type policy;
  policy.policy.window = 1;
  policy.policy.group = restkv::group_reduce::mean;
  policy.policy.budget = {.budget = input.pick(1, 8), .floor = static_cast<float>(input.pick(0, 4)) / 4};
  policy.policy.protect = {.sink = input.pick(0, 2), .recent = input.pick(0, 3)};
  policy.policy.granularity = {.tokens = input.pick(1, 3), .shared = input.pick(0, 1) == 1};
  policy.high_water = input.pick(1, 20);
  policy.evict_every = input.pick(0, 4);
  policy.refresh = input.pick(1, 3);
  policy.speculation = input.pick(0, 3);
  const restkv::problem_shape shape{
      .query_heads = 2 * input.pick(1, 2), .kv_heads = 2, .head_dim = head_dim, .layers = input.pick(1, 2)};
  restkv::reference_backend backend;
  restkv::session_plan<policy_type> plan;
  if (!restkv::make_session_plan<restkv::half>(backend, policy, shape, plan).ok()) return 0;
  std::array<std::vector<std::byte>, 2> memory{std::vector<std::byte>(plan.memory_bytes),
                                               std::vector<std::byte>(plan.memory_bytes)};
  std::array<session_type, 2> sessions;
  for (std::size_t i = 0; i < 2; ++i) require(sessions[i].open(backend, plan, memory[i]).ok());

  for (int calls = 0; calls < 60 && !input.empty(); ++calls) {
    session_type& session = sessions[static_cast<std::size_t>(input.pick(0, 1))];
    session_type& other = &session == sessions.data() ? sessions[1] : sessions[0];
    const index_t layer = input.pick(0, shape.layers);  // one too many
    switch (input.pick(0, 8)) {
      case 0:
      case 1:
      case 2: {
        const index_t n = input.pick(0, 9);
        std::vector<restkv::half> elements(static_cast<std::size_t>((shape.query_heads + 4) * n * head_dim));
        for (auto& element : elements) element = input.element();
        const restkv::half* const first = elements.data();
        const restkv::half* const keys = first + shape.query_heads * n * head_dim;
        const std::array<index_t, 3> cache{2, n, head_dim};
        const index_t had = layer < shape.layers ? session.tokens_seen(layer) + session.speculated(layer) : 0;
        const bool took = session
                              .append(layer, {first, {shape.query_heads, n, head_dim}}, {keys, cache},
                                      {keys + 2 * n * head_dim, cache})
                              .ok();
        if (layer == shape.layers) {
          require(!took);
        } else {
          require(session.tokens_seen(layer) + session.speculated(layer) == had + (took ? n : 0));
          require(took || session.speculating());
        }
        break;
      }
      case 3:
        require(session.evict(layer).ok() == (layer < shape.layers && !session.speculating()));
        break;
      case 4:
        require(session.evict_if_due(layer).ok() == (layer < shape.layers));
        break;
      case 5:
        if (!session.speculating()) {
          require(session.begin_speculation().ok() == (plan.policy.speculation > 0));
        } else if (input.pick(0, 1) == 0) {
          require(session.rollback().ok());
        } else {
          const index_t accepted = input.pick(0, 3);
          if (!session.commit(accepted).ok()) require(session.speculating());
        }
        break;
      case 6: {
        const bool copied = session.fork_to(other).ok();
        require(copied == (!session.speculating() && !other.speculating()));
        if (copied) require(bytes_of(other) == bytes_of(session));
        break;
      }
      case 7: {  // an archive, patched, with a checksum that is right
        if (session.speculating()) break;
        std::vector<std::byte> bytes = bytes_of(session);
        for (index_t patches = input.pick(0, 3); patches > 0; --patches) {
          const auto at = static_cast<std::size_t>(input.byte() << 8 | input.byte()) % bytes.size();
          bytes[at] = static_cast<std::byte>(input.byte());
        }
        if (input.pick(0, 7) == 0) bytes.resize(static_cast<std::size_t>(input.byte() << 4) % (bytes.size() + 9));
        if (bytes.size() >= 8) {
          const std::uint64_t sum = restkv::detail::checksum(std::span(bytes).first(bytes.size() - 8));
          restkv::detail::copy_little_endian(&sum, bytes.data() + bytes.size() - 8, 1);
        }
        const auto before = other.speculating() ? std::vector<std::byte>{} : bytes_of(other);
        if (restkv::restore(other, bytes).ok()) {
          require(bytes_of(other) == bytes);
        } else if (!other.speculating()) {
          require(bytes_of(other) == before);
        }
        break;
      }
      default:
        if (input.pick(0, 9) == 0) session.clear();
    }
    check(session);
    check(other);
  }
  return 0;
}
