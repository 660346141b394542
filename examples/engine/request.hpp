// SPDX-License-Identifier: Apache-2.0
/// @file
/// Requests, and a random stream of them that all begin with the same system prompt.
#pragma once

#include "model.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace engine {

/// Never, as a number of events.
inline constexpr index_t never = std::numeric_limits<index_t>::max();

/// What a user asks for.
struct request {
  index_t id = 0;
  index_t arrival = 0;           ///< the step before which it is submitted
  std::vector<token> prompt{};   ///< the system prompt, then the user's own tokens; ascending
  std::vector<token> answer{};   ///< what the model will say, a token a step
  index_t cancel_after = never;  ///< how many events of its life the user waits: see `engine`
};

/// A stream of requests. Lengths are drawn uniformly between the bounds.
struct request_stream {
  index_t requests = 100;
  index_t system_tokens = 128;  ///< tokens [0, system_tokens) of the model
  index_t context_least = 200;  ///< a passage somewhere in the recording
  index_t context_most = 900;
  index_t question_least = 32;  ///< the recording's last tokens before the answer
  index_t question_most = 64;
  index_t answer_least = 8;  ///< recorded after those
  index_t answer_most = 32;
  index_t prompt_tokens = 0;        ///< of the model, without its answer
  double arrivals_per_step = 0.25;  ///< of a Poisson process
  double cancelled = 0.1;           ///< the part of the users that lose patience
  unsigned seed = 1;
};

/// Draws the requests of a stream, in order of arrival. The same seed gives the same requests everywhere.
///
/// Throws std::runtime_error where the recording is too short for what is asked for.
inline std::vector<request> make_requests(const request_stream& stream, const model& recorded) {
  const index_t room = stream.prompt_tokens - stream.system_tokens - stream.question_most;
  const index_t answers = recorded.tokens() - stream.prompt_tokens;
  if (stream.context_most > room || stream.answer_most > answers) {
    throw std::runtime_error("contexts of " + std::to_string(stream.context_most) + " tokens and answers of " +
                             std::to_string(stream.answer_most) + ": the recording has room for " +
                             std::to_string(room) + " and " + std::to_string(answers));
  }
  std::mt19937 random(stream.seed);
  const auto uniform = [&] { return static_cast<double>(random()) / 4294967296.0; };  // [0, 1)
  const auto pick = [&](index_t low, index_t high) {
    return low + static_cast<index_t>(uniform() * static_cast<double>(high - low + 1));
  };
  std::vector<request> made;
  double time = 0;
  for (index_t id = 0; id < stream.requests; ++id) {
    request r;
    r.id = id;
    time -= std::log(1 - uniform()) / stream.arrivals_per_step;
    r.arrival = static_cast<index_t>(time);
    const auto append = [](std::vector<token>& tokens, index_t begin, index_t count) {
      tokens.resize(tokens.size() + static_cast<std::size_t>(count));
      std::iota(tokens.end() - count, tokens.end(), static_cast<token>(begin));
    };
    const index_t context = pick(stream.context_least, stream.context_most);
    const index_t question = pick(stream.question_least, stream.question_most);
    append(r.prompt, 0, stream.system_tokens);
    append(r.prompt, stream.system_tokens + pick(0, room - context), context);
    append(r.prompt, stream.prompt_tokens - question, question);
    append(r.answer, stream.prompt_tokens, pick(stream.answer_least, stream.answer_most));
    if (uniform() < stream.cancelled) r.cancel_after = pick(0, 3 * static_cast<index_t>(r.answer.size()));
    made.push_back(std::move(r));
  }
  return made;
}

}  // namespace engine
