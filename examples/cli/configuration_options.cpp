// SPDX-License-Identifier: Apache-2.0
#include "configuration.hpp"

#include "policy_table.hpp"

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include <type_traits>
#include <vector>

namespace restkv::cli {

namespace {

template <class Value>
void add_key_option(CLI::App& command, const key_facts& key, const std::shared_ptr<nlohmann::json>& keys) {
  const std::string name = key.name;
  if constexpr (std::is_enum_v<Value>) {
    const std::vector<std::string> known(names<Value>::values.begin(), names<Value>::values.end());
    command
        .add_option_function<std::string>(
            key.option, [keys, name](const std::string& value) { (*keys)[name] = value; }, key.meaning)
        ->check(CLI::IsMember(known))
        ->type_name("")
        ->group("Configuration");
  } else if constexpr (std::is_same_v<Value, bool>) {
    const std::string flags = std::string(key.option) + ",!--no-" + (key.option + 2);
    command
        .add_flag_function(
            flags, [keys, name](std::int64_t count) { (*keys)[name] = count > 0; }, key.meaning)
        ->group("Configuration");
  } else {
    using number = std::conditional_t<std::is_floating_point_v<Value>, double, Value>;
    command
        .add_option_function<number>(
            key.option, [keys, name](const number& value) { (*keys)[name] = value; }, key.meaning)
        ->group("Configuration");
  }
}

}  // namespace

configuration configuration_options::over(const std::string* case_text, const std::string& where) const {
  nlohmann::json object = case_text == nullptr ? nlohmann::json::object() : parse_flat_object(*case_text, where);
  configuration c;
  if (!preset.empty() || case_text == nullptr) {
    // What remains of the case: how many tokens, and how many queries were recorded to look at.
    c = policy_of(preset.empty() ? "standard" : preset);
    nlohmann::json kept = nlohmann::json::object();
    for (const char* key : {"budget", "compression_ratio", "window"}) {
      if (object.contains(key)) kept[key] = object[key];
    }
    apply(c, kept, where);
  } else {
    c = parse_configuration(*case_text, where);
  }
  if (keys->contains("method")) {
    // Another method is another set of defaults; what the case says beyond them stays.
    object["method"] = (*keys)["method"];
    c = defaults_of(method_in(object, "--method"));
    apply(c, object, where);
  }
  apply(c, *keys, "the options");
  return c;
}

void add_configuration_options(CLI::App& command, configuration_options& options) {
  options.keys = std::make_shared<nlohmann::json>(nlohmann::json::object());
  CLI::Option& preset = *command.add_option(
      "--preset", options.preset,
      "A policy by name (see compare --list-policies) instead of the file's; its budget and window stay");
  configuration c;
  visit_keys(c, [&]<class Value>(const key_facts& key, Value&) { add_key_option<Value>(command, key, options.keys); });
  preset.group("Configuration")->excludes("--method");
}

}  // namespace restkv::cli
