// SPDX-License-Identifier: Apache-2.0
// A conversation with a model that remembers a part of it: llama.cpp with a cache of --cells cells, which is evicted to
// --keep tokens when it is full. Positions stay what they were; nothing is shifted.
//
//   converse MODEL.gguf [--cells N] [--keep N] [--policy restkv|recent] [--answer N] < questions.txt
//
// A question a line. Built by build.sh.
#include "shared_eviction.hpp"

#include <llama.h>

#include <algorithm>
#include <charconv>
#include <cstdio>
#include <cstring>
#include <exception>
#include <iostream>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

using restkv::index_t;

struct options {
  std::string model;
  index_t cells = 256;  ///< of the cache; llama.cpp rounds it up to a multiple of 256
  index_t keep = 128;   ///< tokens that an eviction leaves
  index_t answer = 64;  ///< tokens of an answer at most
  bool recent = false;
};

constexpr index_t window = 32;
constexpr index_t sink = 4;
constexpr index_t chunk = 64;  // tokens of a prompt that are decoded at a time

template <class T, void (*Free)(T*)>
struct freer {
  void operator()(T* object) const noexcept { Free(object); }
};
template <class T, void (*Free)(T*)>
using owned = std::unique_ptr<T, freer<T, Free>>;

class conversation {
 public:
  explicit conversation(const options& chosen) : options_(chosen) {
    llama_log_set(
        [](ggml_log_level level, const char* text, void*) {
          if (level == GGML_LOG_LEVEL_ERROR) std::fputs(text, stderr);
        },
        nullptr);
    model_.reset(llama_model_load_from_file(chosen.model.c_str(), llama_model_default_params()));
    if (model_ == nullptr) throw std::runtime_error(chosen.model + " cannot be loaded");
    const index_t query_heads = llama_model_n_head(model_.get());
    cache_ = std::make_unique<observed_cache>(llama_model_n_layer(model_.get()), query_heads,
                                              llama_model_n_head_kv(model_.get()),
                                              llama_model_n_embd(model_.get()) / query_heads, window);
    llama_context_params how = llama_context_default_params();
    how.n_ctx = static_cast<std::uint32_t>(chosen.cells);
    how.n_batch = how.n_ubatch = chunk;
    how.n_threads = how.n_threads_batch = 1;
    how.cb_eval = observed_cache::callback;
    how.cb_eval_user_data = cache_.get();
    context_.reset(llama_init_from_model(model_.get(), how));
    if (context_ == nullptr) throw std::runtime_error("no context of " + std::to_string(chosen.cells) + " cells");
    if (chosen.keep + chunk > llama_n_ctx(context_.get())) {
      throw std::runtime_error(std::to_string(chosen.keep) + " tokens and " + std::to_string(chunk) +
                               " new ones do not fit " + std::to_string(llama_n_ctx(context_.get())) + " cells");
    }
    sampler_.reset(llama_sampler_init_greedy());
  }

  /// Answers a question, and says on stderr what is in the cache.
  void ask(const std::string& question) {
    std::printf("> %s\n", question.c_str());
    std::fflush(stdout);
    std::vector<llama_token> tokens = tokenize(
        (positions_.empty() ? std::string("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n") : "\n") +
        "<|im_start|>user\n" + question + "<|im_end|>\n<|im_start|>assistant\n");
    for (std::size_t begin = 0; begin < tokens.size(); begin += chunk) {
      const std::size_t end = std::min(tokens.size(), begin + chunk);
      decode(std::vector<llama_token>(tokens.begin() + static_cast<std::ptrdiff_t>(begin),
                                      tokens.begin() + static_cast<std::ptrdiff_t>(end)));
    }
    for (index_t i = 0; i < options_.answer; ++i) {
      const llama_token next = llama_sampler_sample(sampler_.get(), context_.get(), -1);
      const bool ends = llama_vocab_is_eog(vocabulary(), next) || i + 1 == options_.answer;
      if (!ends) std::printf("%s", piece(next).c_str());
      decode({next});
      if (ends) break;
    }
    std::printf("\n");
    std::fflush(stdout);
    std::fprintf(stderr, "  [%zu tokens so far, %zu in the cache]\n", static_cast<std::size_t>(next_position_),
                 positions_.size());
  }

 private:
  [[nodiscard]] const llama_vocab* vocabulary() const { return llama_model_get_vocab(model_.get()); }

  [[nodiscard]] std::vector<llama_token> tokenize(const std::string& text) const {
    std::vector<llama_token> tokens(text.size() + 8);
    const auto count = llama_tokenize(vocabulary(), text.c_str(), static_cast<std::int32_t>(text.size()), tokens.data(),
                                      static_cast<std::int32_t>(tokens.size()), false, true);
    if (count < 0) throw std::runtime_error("a question cannot be tokenised");
    tokens.resize(static_cast<std::size_t>(count));
    return tokens;
  }

  [[nodiscard]] std::string piece(llama_token token) const {
    char text[256];
    const int length = llama_token_to_piece(vocabulary(), token, text, sizeof text, 0, false);
    return {text, static_cast<std::size_t>(std::max(length, 0))};
  }

  /// Evaluates tokens at the positions behind all earlier ones, evicting first where they would not fit.
  void decode(std::vector<llama_token> tokens) {
    const auto count = static_cast<index_t>(tokens.size());
    if (static_cast<index_t>(positions_.size()) + count > llama_n_ctx(context_.get())) evict();
    std::vector<llama_pos> positions;
    for (index_t i = 0; i < count; ++i) positions.push_back(next_position_++);
    llama_batch batch = llama_batch_get_one(tokens.data(), static_cast<std::int32_t>(count));
    batch.pos = positions.data();
    if (const int failed = llama_decode(context_.get(), batch); failed != 0) {
      throw std::runtime_error("llama_decode returned " + std::to_string(failed) + " with " +
                               std::to_string(positions_.size()) + " of " +
                               std::to_string(llama_n_ctx(context_.get())) + " cells in use");
    }
    positions_.insert(positions_.end(), positions.begin(), positions.end());
    if (cache_->tokens() != static_cast<index_t>(positions_.size())) {
      throw std::runtime_error("the callback saw " + std::to_string(cache_->tokens()) + " tokens, the cache has " +
                               std::to_string(positions_.size()));
    }
  }

  /// Removes from llama.cpp's cache all tokens that are not kept, a run of positions at a time.
  void evict() {
    const std::vector<restkv::position_t> kept = choose_tokens(*cache_, options_.keep, window, sink, options_.recent);
    std::vector<llama_pos> left;
    llama_pos begin = positions_.front();
    for (const restkv::position_t slot : kept) {
      const llama_pos position = positions_[static_cast<std::size_t>(slot)];
      remove(begin, position);
      begin = position + 1;
      left.push_back(position);
    }
    remove(begin, next_position_);
    std::fprintf(stderr, "  [evicted %zu of %zu tokens, positions %d to %d]\n", positions_.size() - left.size(),
                 positions_.size(), positions_.front(), positions_.back());
    cache_->keep(kept);
    positions_ = std::move(left);
  }
  void remove(llama_pos begin, llama_pos end) {
    if (begin == end) return;
    if (!llama_memory_seq_rm(llama_get_memory(context_.get()), 0, begin, end)) {
      throw std::runtime_error("positions " + std::to_string(begin) + " to " + std::to_string(end) +
                               " cannot be removed from this kind of cache");
    }
  }

  options options_;
  owned<llama_model, llama_model_free> model_;
  std::unique_ptr<observed_cache> cache_;
  owned<llama_context, llama_free> context_;
  owned<llama_sampler, llama_sampler_free> sampler_;
  std::vector<llama_pos> positions_;  // of the tokens in the cache, ascending
  llama_pos next_position_ = 0;
};

bool parse(int count, char** arguments, options& out) {
  if (count < 2 || count % 2 != 0) return false;
  out.model = arguments[1];
  for (int i = 2; i < count; i += 2) {
    const std::string name = arguments[i];
    const std::string text = arguments[i + 1];
    if (name == "--policy") {
      out.recent = text == "recent";
      if (!out.recent && text != "restkv") return false;
      continue;
    }
    index_t* const number = name == "--cells"    ? &out.cells
                            : name == "--keep"   ? &out.keep
                            : name == "--answer" ? &out.answer
                                                 : nullptr;
    if (number == nullptr) return false;
    const auto [stop, failed] = std::from_chars(text.data(), text.data() + text.size(), *number);
    if (failed != std::errc() || stop != text.data() + text.size() || *number < 1 || *number > 1'000'000) return false;
  }
  return true;
}

}  // namespace

int main(int count, char** arguments) {
  options chosen;
  if (!parse(count, arguments, chosen)) {
    std::fprintf(stderr, "usage: converse MODEL.gguf [--cells N] [--keep N] [--policy restkv|recent] [--answer N]\n");
    return 2;
  }
  try {
    conversation talk(chosen);
    for (std::string question; std::getline(std::cin, question);) {
      if (!question.empty()) talk.ask(question);
    }
    return 0;
  } catch (const std::exception& problem) {
    std::fprintf(stderr, "converse: %s\n", problem.what());
    return 1;
  }
}
