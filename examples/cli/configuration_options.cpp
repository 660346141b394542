// SPDX-License-Identifier: Apache-2.0
#include "configuration.hpp"

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

void add_configuration_options(CLI::App& command, configuration_options& options) {
  options.keys = std::make_shared<nlohmann::json>(nlohmann::json::object());
  CLI::Option& preset = *command.add_option(
      "--preset", options.preset, "A policy of the library instead of the file's; the file's budget and window stay");
  configuration c;
  visit_keys(c, [&]<class Value>(const key_facts& key, Value&) { add_key_option<Value>(command, key, options.keys); });
  preset.group("Configuration")->excludes("--method");
}

}  // namespace restkv::cli
