// SPDX-License-Identifier: Apache-2.0
// What comes out of compaction is what attention wants: decodes over a compacted cache, ragged and in pages, and
// compares with attention over the whole cache restricted to the kept set.
//
//   decode_attention examples/data/trace-2k.safetensors [--layer N] [--tokens-per-head B] [--append N] [--page-size P]
//                    [--element half|bfloat16|float] [--write FILE]
//
// --write stores what an engine would hand to an attention library; attention_libraries.py does so.
#include "attention.hpp"
#include "decode_batch.hpp"
#include "engine_cache.hpp"

#include <restkv/interop/safetensors_writer.hpp>
#include <restkv/presets.hpp>
#include <restkv/reference/backend.hpp>
#include <restkv/select.hpp>

#include <array>
#include <charconv>
#include <cstdio>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

using restkv::index_t;

struct options {
  std::string trace;
  std::string layer = "19";
  index_t tokens_per_head = 256;
  index_t append = 20;
  index_t page_size = 16;
  std::string element = "half";
  std::string write;
};

/// How far outputs are from what is expected, and how much of the bound that is.
struct difference {
  double largest = 0;
  double of_bound = 0;  ///< largest difference / its bound; infinite for what is not a number
};

difference compare(const std::vector<float>& output, const expected_attention& expected, index_t channels) {
  difference found;
  for (std::size_t i = 0; i < output.size(); ++i) {
    const std::size_t row = i / static_cast<std::size_t>(channels);
    const double bound =
        float_bound(expected.tokens[row], channels, expected.logit_magnitude[row], expected.magnitude[i]);
    const double off = std::abs(double{output[i]} - expected.output[i]);
    if (off == 0) continue;
    const auto number = [](double x) { return std::isnan(x) ? std::numeric_limits<double>::infinity() : x; };
    found.largest = std::max(found.largest, number(off));
    found.of_bound = std::max(found.of_bound, number(off / bound));
  }
  return found;
}

/// Prints one comparison and the same with a mistake made on purpose, which must be seen.
bool report(const char* element, const char* layout, const difference& right, const difference& wrong) {
  const bool ok = right.of_bound <= 1 && wrong.of_bound > 1;
  std::printf("  %-13s  %-6s  %9.2e %10.4f of it %12.3g of it   %s\n", element, layout, right.largest, right.of_bound,
              wrong.of_bound, ok ? "ok" : "FAIL");
  return ok;
}

/// Both caches in one element type, through two steps.
template <class T>
class decoder {
 public:
  decoder(const options& chosen, const decode_batch& batch, const restkv::const_kept_tokens& kept)
      : options_(chosen), batch_(batch), kept_(kept) {
    batch.convert(tensors_);
  }

  /// Whether all outputs are as expected.
  bool run(const char* element) {
    const cache_tensors<T> prompt{tensors_.key.view, tensors_.value.view};
    const cache_tensors<T> more{tensors_.more_key.view, tensors_.more_value.view};
    ragged_cache<T> ragged(kept_, prompt);
    paged_cache<T> paged(decode_batch::sequences, kept_.heads(), prompt.key.extent(3), options_.page_size,
                         prompt.key.extent(2) + options_.append);
    std::array<std::int32_t, 2> now{0, 0};
    paged.append(prompt, now, batch_.lengths());
    paged.keep(kept_);
    // A step appends its token and then attends; the last steps are different ones for the two sequences.
    const auto last = static_cast<std::int32_t>(options_.append);
    bool ok = true;
    for (const std::array<std::int32_t, 2>& until : {std::array{1, 1}, std::array{last, (last + 1) / 2}}) {
      ragged.append(more, now, until);
      paged.append(more, now, until);
      now = until;
      ok = step(element, ragged, paged, now) && ok;
    }
    return ok;
  }

 private:
  bool step(const char* element, ragged_cache<T>& ragged, paged_cache<T>& paged,
            const std::array<std::int32_t, 2>& now) {
    const index_t heads = tensors_.more_query.view.extent(1);
    const index_t channels = ragged.head_dim;
    const index_t group = heads / ragged.kv_heads;
    std::vector<T> query;  // [batch, heads, channels], of the newest token
    for (index_t b = 0; b < decode_batch::sequences; ++b) {
      for (index_t h = 0; h < heads; ++h) {
        const auto row = tensors_.more_query.view[b][h][now[static_cast<std::size_t>(b)] - 1];
        for (index_t c = 0; c < channels; ++c) query.push_back(row(c));
      }
    }
    const expected_attention expected =
        masked_attention<T>({query.data(), {decode_batch::sequences, heads, channels}}, tensors_.key.view,
                            tensors_.value.view, tensors_.more_key.view, tensors_.more_value.view, kept_, now);

    const auto over_ragged = [&](const std::vector<std::int64_t>& offsets) {
      return compare(
          ragged_attention<T>({query.data(), ragged.key.data(), ragged.value.data(), offsets, group, channels}),
          expected, channels);
    };
    const auto over_pages = [&](const std::vector<restkv::page_t>& ids) {
      return compare(paged_attention<T>({query.data(), paged.key.data(), paged.value.data(), ids, paged.lengths,
                                         paged.page_size, group, channels}),
                     expected, channels);
    };
    // Mistakes: the first head ends one token too early, or the first two heads have exchanged their first page.
    std::vector<std::int64_t> wrong_offsets = ragged.cu_seqlens;
    wrong_offsets[1] -= 1;
    std::vector<restkv::page_t> wrong_ids = paged.ids;
    std::swap(wrong_ids[0], wrong_ids[static_cast<std::size_t>(paged.most_pages)]);
    const std::string label = std::string(element) + " +" + std::to_string(now[0]);
    const bool ragged_ok = report(label.c_str(), "ragged", over_ragged(ragged.cu_seqlens), over_ragged(wrong_offsets));
    const bool paged_ok = report(label.c_str(), "paged", over_pages(paged.ids), over_pages(wrong_ids));
    if (!options_.write.empty() && options_.element == element) write(ragged, paged, query, expected, heads);
    return ragged_ok && paged_ok;
  }

  /// Everything that a library needs; a later step replaces the file.
  void write(ragged_cache<T>& ragged, paged_cache<T>& paged, const std::vector<T>& query,
             const expected_attention& expected, index_t heads) const {
    const index_t rows = decode_batch::sequences * ragged.kv_heads;
    const index_t channels = ragged.head_dim;
    const index_t total = ragged.cu_seqlens.back();
    restkv::safetensors_writer out;
    const auto tensor = [&](const char* name, const auto& elements, const auto&... extents) {
      using element_type = typename std::remove_cvref_t<decltype(elements)>::value_type;
      out.add(name, restkv::tensor_view<const element_type, sizeof...(extents)>(elements.data(), {extents...}));
    };
    tensor("query", query, decode_batch::sequences, heads, channels);
    tensor("ragged_key", ragged.key, total, channels);
    tensor("ragged_value", ragged.value, total, channels);
    tensor("cu_seqlens", ragged.cu_seqlens, rows + 1);
    tensor("key_pages", paged.key, paged.pages, paged.page_size, channels);
    tensor("value_pages", paged.value, paged.pages, paged.page_size, channels);
    tensor("block_tables", paged.ids, rows, paged.most_pages);
    tensor("lengths", paged.lengths, rows);
    tensor("expected", expected.output, decode_batch::sequences, heads, channels);
    tensor("magnitude", expected.magnitude, decode_batch::sequences, heads, channels);
    tensor("value_sum", expected.value_sum, decode_batch::sequences, heads, channels);
    tensor("logit_magnitude", expected.logit_magnitude, decode_batch::sequences, heads);
    restkv::throw_if_failed(out.write(options_.write));
  }

  const options& options_;
  const decode_batch& batch_;
  restkv::const_kept_tokens kept_;
  decode_batch::elements<T> tensors_;
};

bool run(const options& chosen) {
  restkv::safetensors_file file;
  restkv::throw_if_failed(restkv::safetensors_file::open(chosen.trace, file));
  const decode_batch batch(file, "layers." + chosen.layer + ".");
  if (chosen.append > batch.future_tokens()) {
    throw std::runtime_error("--append " + std::to_string(chosen.append) + ": " +
                             std::to_string(batch.future_tokens()) + " tokens were recorded after the prompt");
  }
  // Heads compete for the layer's budget, so they keep different numbers of tokens.
  restkv::reference_backend backend;
  const restkv::owned_selection selection =
      restkv::select(backend, restkv::presets::ada_kv(chosen.tokens_per_head), batch.layer());
  const restkv::const_kept_tokens kept = selection.kept();
  for (index_t b = 0; b < kept.batch(); ++b) {
    std::printf("sequence %lld: of %lld tokens, heads keep", static_cast<long long>(b),
                static_cast<long long>(batch.lengths()[static_cast<std::size_t>(b)]));
    for (index_t h = 0; h < kept.heads(); ++h) std::printf(" %lld", static_cast<long long>(kept.lengths(b, h)));
    std::printf("\n");
  }
  std::printf("  %-13s  %-6s  %9s %16s %18s\n", "appended", "layout", "off by", "bound", "with a mistake");
  bool ok = decoder<float>(chosen, batch, kept).run("float");
  ok = decoder<restkv::half>(chosen, batch, kept).run("half") && ok;
  ok = decoder<restkv::bfloat16>(chosen, batch, kept).run("bfloat16") && ok;
  return ok;
}

/// A whole number at least 1, or 0 where `text` is none.
index_t positive(const char* text) {
  index_t number = 0;
  const char* const end = text + std::strlen(text);
  const auto [stop, failed] = std::from_chars(text, end, number);
  return failed == std::errc() && stop == end && number < 1'000'000'000 ? std::max<index_t>(number, 0) : 0;
}

bool parse(int count, char** arguments, options& out) {
  if (count < 2 || count % 2 != 0) return false;
  out.trace = arguments[1];
  for (int i = 2; i < count; i += 2) {
    const std::string name = arguments[i];
    const char* const text = arguments[i + 1];
    index_t* number = nullptr;
    if (name == "--layer")
      out.layer = text;
    else if (name == "--write")
      out.write = text;
    else if (name == "--element")
      out.element = text;
    else if (name == "--tokens-per-head")
      number = &out.tokens_per_head;
    else if (name == "--append")
      number = &out.append;
    else if (name == "--page-size")
      number = &out.page_size;
    else
      return false;
    if (number != nullptr && (*number = positive(text)) == 0) return false;
  }
  return out.element == "half" || out.element == "bfloat16" || out.element == "float";
}

}  // namespace

int main(int count, char** arguments) {
  options chosen;
  if (!parse(count, arguments, chosen)) {
    std::fprintf(stderr,
                 "usage: decode_attention TRACE [--layer N] [--tokens-per-head B] [--append N] [--page-size P] "
                 "[--element half|bfloat16|float] [--write FILE]\n");
    return 2;
  }
  try {
    return run(chosen) ? 0 : 1;
  } catch (const std::exception& problem) {
    std::fprintf(stderr, "decode_attention: %s\n", problem.what());
    return 1;
  }
}
