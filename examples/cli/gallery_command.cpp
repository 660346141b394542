// SPDX-License-Identifier: Apache-2.0
/// @file
/// `restkv gallery`: the page of all policies, from the table that the program runs.
#include "command.hpp"
#include "output.hpp"
#include "policy_table.hpp"

#include <restkv/interop/safetensors.hpp>

#include <CLI/CLI.hpp>
#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <map>
#include <memory>

namespace restkv::cli {

namespace {

/// What the code does not say about a method.
struct method_facts {
  method_kind method;
  const char* formula;
  const char* source;
  const char* cost;  ///< of a token and query head, or of a token and KV head for scores of the cache
};

// a attention, o output, v value, k key, q query, z logit, W the head's slice of W_O, w queries, d channels.
constexpr method_facts facts[] = {
    {method_kind::restkv, "a / (1 - a) * norm of W (o - v)", "arXiv 2605.08840", "2 w d, d^2 / 2 where not pruned"},
    {method_kind::caote, "a / (1 - a) * norm of o - v", "arXiv 2504.14051", "2 w d"},
    {method_kind::fastcaote, "a / (1 - a) * norm of mean v - v", "arXiv 2504.14051", "w d, 2 d"},
    {method_kind::dropkv, "(a / (1 - a))^2 * squared norm of o - v", "ICML 2026", "2 w d"},
    {method_kind::snapkv, "a", "arXiv 2404.14469", "w d"},
    {method_kind::adakv, "a", "arXiv 2407.11550", "w d"},
    {method_kind::h2o, "a of every query", "arXiv 2306.14048", "length d / 2"},
    {method_kind::keyformer, "softmax of (z + Gumbel noise) / temperature, of every query", "arXiv 2403.09054",
     "length d / 2, 2 logarithms a query"},
    {method_kind::tova, "a of the last query", "arXiv 2401.06104", "d"},
    {method_kind::rkv, "lambda a - (1 - lambda) redundancy of the key", "arXiv 2505.24133", "w d, up to length d"},
    {method_kind::vatp, "a * l1 norm of v", "arXiv 2406.12335", "w d, d"},
    {method_kind::criticalkv, "a, then (a + epsilon) * l1 norm of W v", "arXiv 2502.03805", "w d, hidden d"},
    {method_kind::lava, "a * largest l1 norm of the head's v", "arXiv 2509.09754", "w d, d"},
    {method_kind::defensivekv, "largest pooled a * l1 norm of W v", "arXiv 2510.13334", "w d, hidden d"},
    {method_kind::obcache, "a^2 |v|^2, (a z)^2 |v - o|^2, or both and their cross term", "arXiv 2510.07651", "2 w d"},
    {method_kind::laprox, "a * norm of W v", "arXiv 2605.07234", "w d, d^2"},
    {method_kind::andpro, "a * o v", "NeurIPS 2025", "2 w d"},
    {method_kind::knorm, "- norm of k", "arXiv 2406.11430", "d"},
    {method_kind::keydiff, "- cosine of k and the mean of unit keys", "arXiv 2504.15364", "4 d"},
    {method_kind::lagkv, "spread of k and v in the ranges of the next chunk", "arXiv 2504.04704", "12 d"},
    {method_kind::curdkv, "|k|^2 |v|^2, each as a share of its window", "arXiv 2509.15038", "2 d"},
    {method_kind::leverage, "x^T (X^T X + ridge I)^-1 x, x the centred key", "arXiv 2507.08143", "2 d s + s^2, s = 48"},
    {method_kind::keyredundancy, "- mean cosine with the other keys, as a share", "arXiv 2505.24133", "up to length d"},
    {method_kind::valuerange, "max v - min v", "arXiv 2606.03928", "2 d"},
    {method_kind::expectedattention, "softmax of m k + k^T C k / 2, times norm of v", "arXiv 2510.00636",
     "d^2 / 2 + 3 d"},
    {method_kind::qfilter, "k f, f the main direction of queries", "arXiv 2503.02812", "d"},
    {method_kind::capkv, "w v^T (I + sum of w v v^T)^-1 v", "arXiv 2604.25975", "d^2 + d"},
    {method_kind::lacache, "a ladder of positions over the layers", "arXiv 2507.14204", "1"},
    {method_kind::streamingllm, "position", "arXiv 2309.17453", "1"},
    {method_kind::random, "a random number", "null policy", "1"}};

const method_facts& facts_of(method_kind method) {
  return *std::find_if(std::begin(facts), std::end(facts), [&](const method_facts& f) { return f.method == method; });
}

std::string needs_of(const configuration& c) {
  std::string needs;
  const auto add = [&](const std::string& what) { needs += (needs.empty() ? "" : ", ") + what; };
  if (c.observes_every_query()) {
    add("every query");
  } else if (c.observes()) {
    add(c.window == 1 ? "1 query" : fmt::format("{} queries", c.window));
  } else if (c.reads_queries()) {
    add("statistics of queries");
  }
  if (c.needs_wo()) add("W_O");
  return needs.empty() ? "nothing" : needs;
}

std::string smoothing_of(const configuration& c) {
  std::string text;
  const auto add = [&](const std::string& what) { text += (text.empty() ? "" : ", ") + what; };
  if (c.observes()) add(c.temporal == temporal_kind::ema ? fmt::format("ema {}", c.alpha) : name_of(c.temporal));
  if (c.spatial != spatial_kind::none) add(fmt::format("{} {}", name_of(c.spatial), c.kernel));
  return text.empty() ? "none" : text;
}

std::string sets_of(const configuration& c) {
  std::string sets = c.shared ? "one" : c.per_query_head() ? "per query head" : "per KV head";
  if (!c.per_query_head()) sets += std::string(", ") + name_of(c.group);
  if (c.unit > 1) sets += fmt::format(", units of {}", c.unit);
  return sets;
}

std::string allocation_of(const configuration& c) {
  return c.allocation == allocation_kind::adakv ? fmt::format("adakv, floor {}", c.floor) : name_of(c.allocation);
}

std::string protection_of(const configuration& c) {
  const index_t window = c.observes() && !c.scores_window() ? c.window : 0;
  return fmt::format("{} + {}", c.n_sink, std::max(window, c.protected_recent()));
}

/// Which other parts the policy's own may be exchanged for.
std::string partners_of(const configuration& c) {
  std::string text;
  const auto add = [&](const char* what) { text += (text.empty() ? "" : ", ") + std::string(what); };
  if (c.observes()) add(c.scores_window() ? "temporal that can be folded" : "any temporal");
  add("any spatial, group, budget");
  if (c.rescoring == rescoring_kind::none || c.rescoring == rescoring_kind::lava) add("units, shared sets");
  if (c.rescoring != rescoring_kind::none) add("its rescoring over other scores");
  return text;
}

/// Case files by the method whose results they hold.
std::map<method_kind, int> count_known(const std::vector<std::string>& files) {
  std::map<method_kind, int> known;
  for (const std::string& path : files) {
    safetensors_file file;
    require(safetensors_file::open(path, file), "");
    const std::string* const text = file.find_metadata("case");
    if (text == nullptr) throw input_error(path + ": the metadata have no case: this is no case file");
    ++known[parse_configuration(*text, path + ": metadata case").method];
  }
  return known;
}

std::string gallery_text(const std::map<method_kind, int>& known) {
  std::string text = R"(# Policy gallery

Every policy that `restkv compare` runs, with the settings that it runs it with; `restkv gallery` writes this page. Each
is a combination of parts ([Policies](policies.md)), and each part may be exchanged for another.

![Tokens that each policy keeps of a recorded prompt](figures/kept.svg)

One row a policy: how many of the KV heads of layer 10 of the bundled trace keep a position, at 128 tokens per query head
(2048 tokens, the beginning on the left).

Columns: *needs* beside keys and values; *smoothing* over queries and tokens; *kept sets* and the reduction over the query
heads of a group; *protects* first + newest tokens, the window included.
)";
  for (const policy_group& group : policy_groups()) {
    if (std::string(group.name) == "full") continue;
    text += fmt::format("\n## {}\n\n| policy | needs | smoothing | kept sets | budget | protects | |\n", group.title);
    text += "|---|---|---|---|---|---|---|\n";
    for (const named_policy& policy : policy_table()) {
      if (policy.group != group.name) continue;
      const configuration& c = policy.policy;
      text += fmt::format("| `{}` | {} | {} | {} | {} | {} | {} |\n", policy.name, needs_of(c), smoothing_of(c),
                          sets_of(c), allocation_of(c), protection_of(c), policy.description);
    }
  }
  text += R"(
## Scores

a attention, o output, v value, k key, z logit, W the head's slice of W_O; w queries, d channels. Cost in multiply-adds for
each token and query head, of a score that looks at no query for each token and KV head. *Known results*: files in
`tests/data/golden` with results of the sources' own code, or of a direct evaluation in double, which both backends
reproduce (`restkv verify`); scores without are checked against definitions written apart from them (`tests/score`,
`tests/oracle`).

| method | formula | cost | goes with | source | known results |
|---|---|---|---|---|---|
)";
  std::vector<method_kind> shown;
  for (const named_policy& policy : policy_table()) {
    if (policy.policy.over_layers()) continue;  // its score stands elsewhere
    const method_kind method = policy.policy.method;
    if (std::find(shown.begin(), shown.end(), method) != shown.end()) continue;
    shown.push_back(method);
    const method_facts& f = facts_of(method);
    const auto at = known.find(method);
    text += fmt::format("| `{}` | {} | {} | {} | {} | {} |\n", name_of(method), f.formula, f.cost,
                        partners_of(policy.policy), f.source,
                        at == known.end() ? "-" : fmt::format("{} files", at->second));
  }
  return text;
}

nlohmann::json gallery_json(const std::map<method_kind, int>& known) {
  nlohmann::json policies = nlohmann::json::array();
  for (const named_policy& policy : policy_table()) {
    const method_facts& f = facts_of(policy.policy.method);
    const auto at = known.find(policy.policy.method);
    policies.push_back({{"name", policy.name},
                        {"description", policy.description},
                        {"group", policy.group},
                        {"formula", f.formula},
                        {"source", f.source},
                        {"cost", f.cost},
                        {"needs", needs_of(policy.policy)},
                        {"goes_with", partners_of(policy.policy)},
                        {"known_results", at == known.end() ? 0 : at->second},
                        {"configuration", to_json(policy.policy)}});
  }
  return {{"policies", policies}};
}

}  // namespace

void add_gallery_command(CLI::App& app, invocation& run) {
  CLI::App& command = *app.add_subcommand("gallery", "Every policy with formula, source, needs and cost, as a page");
  const auto files = std::make_shared<std::vector<std::string>>();
  command.add_option("FILES", *files, "Case files with known results, which are counted for each method");
  add_output_options(command, run);
  command.callback([files, &run] {
    const std::map<method_kind, int> known = count_known(*files);
    print(run.json ? gallery_json(known).dump(2) + "\n" : gallery_text(known));
  });
}

}  // namespace restkv::cli
