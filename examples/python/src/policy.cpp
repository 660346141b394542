// SPDX-License-Identifier: Apache-2.0
#include "policy.hpp"

#include "command.hpp"
#include "policy_table.hpp"

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <limits>

namespace restkv::python {

namespace {

using nlohmann::json;

/// A key's value as JSON has it. Numbers of NumPy are taken, too.
json json_of(const std::string& key, nb::handle value) {
  if (nb::isinstance<nb::bool_>(value)) return nb::cast<bool>(value);
  if (nb::isinstance<nb::str>(value)) return nb::cast<std::string>(value);
  if (!nb::isinstance<nb::float_>(value) && PyIndex_Check(value.ptr()) != 0) {
    const nb::object whole = nb::steal(PyNumber_Index(value.ptr()));
    if (!whole.is_valid()) nb::raise_python_error();
    std::int64_t number = 0;
    if (nb::try_cast(whole, number)) return number;
    std::uint64_t large = 0;
    if (nb::try_cast(whole, large)) return large;
    throw failure(errc::invalid_argument, fmt::format("{} is {}, beyond 64 bits", key, text_of(whole)));
  }
  if (PyNumber_Check(value.ptr()) != 0) {
    const nb::object real = nb::steal(PyNumber_Float(value.ptr()));
    if (!real.is_valid()) nb::raise_python_error();
    return nb::cast<double>(real);
  }
  throw failure(errc::invalid_argument,
                fmt::format("{} is a {}, must be a number, a text or a truth value", key,
                            text_of(nb::type_name(value.type()))));
}

json json_of(const nb::dict& keys) {
  json object = json::object();
  for (const auto& [key, value] : keys) {
    const auto name = nb::cast<std::string>(key);
    if (!value.is_none()) object[name] = json_of(name, value);
  }
  return object;
}

nb::object object_of(const json& value) {
  if (value.is_boolean()) return nb::cast(value.get<bool>());
  if (value.is_string()) return nb::cast(value.get<std::string>());
  if (value.is_number_unsigned()) return nb::cast(value.get<std::uint64_t>());
  if (value.is_number_integer()) return nb::cast(value.get<std::int64_t>());
  return nb::cast(value.get<double>());
}

nb::dict dict_of(const policy& p) {
  nb::dict keys;
  const json object = cli::to_json(p.c);
  visit_keys(p.c, [&](const cli::key_facts& key, const auto&) {  // in the order of the list, not of the alphabet
    if (object.contains(key.name)) keys[key.name] = object_of(object[key.name]);
  });
  return keys;
}

policy make(std::string name, cli::configuration c) {
  if (const cli::named_policy* const known = cli::find_policy(name); known != nullptr && known->keeps_all) {
    c.budget = std::numeric_limits<position_t>::max();
    c.compression_ratio = 0.0;
  }
  if (c.method == cli::method_kind::set_error) {
    throw failure(errc::unsupported, "the method set_error measures a given set: see output_error");
  }
  std::string text = cli::to_json(c).dump();
  return {std::move(name), c, std::move(text)};
}

/// A method of the list; nothing where the name is none.
std::optional<cli::configuration> method_of(const std::string& name) {
  const auto& all = cli::names<cli::method_kind>::values;
  const auto at = std::find(all.begin(), all.end(), name);
  if (at == all.end()) return std::nullopt;
  return cli::defaults_of(static_cast<cli::method_kind>(at - all.begin()));
}

cli::configuration named(const std::string& name) {
  const auto method = method_of(name);
  return method && cli::find_policy(name) == nullptr ? *method : cli::policy_of(name);
}

policy new_policy(const std::optional<std::string>& name, const nb::object& budget, const nb::kwargs& given) {
  json keys = json_of(given);
  if (!budget.is_none()) keys["budget"] = json_of("budget", budget);
  cli::configuration c;
  std::string called;
  if (name) {
    if (keys.contains("method")) {
      throw failure(errc::invalid_argument,
                    fmt::format("the name {} and the method {} exclude each other", *name, keys["method"].dump()));
    }
    called = *name;
    c = named(called);
  } else if (keys.contains("method")) {
    c = cli::defaults_of(cli::method_in(keys, "policy"));
  } else {
    called = "standard";
    c = named(called);
  }
  cli::apply(c, keys, "policy");
  return make(called, c);
}

policy replaced(const policy& p, const nb::kwargs& given) {
  const json keys = json_of(given);
  policy made = p;
  if (keys.contains("method")) {
    made.c = cli::defaults_of(cli::method_in(keys, "policy"));
    made.c.budget = p.c.budget;
    made.c.compression_ratio = p.c.compression_ratio;
    made.c.window = p.c.window;
    made.name.clear();
  }
  cli::apply(made.c, keys, "policy");
  return make(made.name, made.c);
}

/// The name and what differs from it: what makes the policy again.
std::string shown(const policy& p) {
  const json object = cli::to_json(p.c);
  json plain = cli::to_json(p.name.empty() ? cli::defaults_of(p.c.method) : named(p.name));
  std::string text = fmt::format("restkv.policy({}{}{}", p.name.empty() ? "method=" : "", "'",
                                 p.name.empty() ? cli::name_of(p.c.method) : p.name.c_str());
  text += "'";
  visit_keys(p.c, [&](const cli::key_facts& key, const auto&) {
    if (!object.contains(key.name)) return;
    const bool size = std::string_view(key.name) == "budget" || std::string_view(key.name) == "compression_ratio";
    if (!size && plain.contains(key.name) && plain[key.name] == object[key.name]) return;
    text += fmt::format(", {}={}", key.name, text_of(nb::repr(object_of(object[key.name]))));
  });
  return text + ")";
}

policy from_text(const std::string& name, const std::string& text) {
  return make(name, cli::parse_configuration(text, "policy"));
}

nb::tuple needs_of(const policy& p) {
  nb::list all;
  if (p.c.reads_queries()) all.append("queries");
  if (p.c.reads_keys()) all.append("keys");
  if (p.c.reads_values()) all.append("values");
  if (p.c.needs_wo()) all.append("wo");
  return nb::tuple(all);
}

nb::dict all_policies() {
  nb::dict all;
  for (const cli::named_policy& named : cli::policy_table()) {
    if (named.refined == cli::refinement::none) all[named.name.c_str()] = named.description;
  }
  return all;
}

}  // namespace

cli::configuration policy::at_layer(std::optional<index_t> index, std::optional<index_t> count) const {
  cli::configuration at = c;
  if (index) at.layer_index = *index;
  if (count) at.layer_count = *count;
  return at;
}

void add_policy(nb::module_& m) {
  nb::class_<policy>(m, "Policy",
                     "Which tokens to keep. Made by `policy`; never changes; equal to another with the same keys.")
      .def_prop_ro("name", [](const policy& p) { return p.name; },
                   "The name it was made from; '' where it was made from a method.")
      .def_prop_ro("window", [](const policy& p) { return p.c.window; }, "Newest queries that it observes.")
      .def_prop_ro("budget", [](const policy& p) { return p.c.budget; },
                   "Tokens kept per head, protected ones included; unused where compression_ratio is not 0.")
      .def_prop_ro("compression_ratio", [](const policy& p) { return p.c.compression_ratio; },
                   "Part of the tokens that is evicted; 0 where the budget counts.")
      .def_prop_ro("needs", &needs_of, nb::sig("def needs(self) -> tuple[str, ...]"),
                   "What it looks at: of 'queries', 'keys', 'values' and 'wo'.")
      .def_prop_ro("needs_w_o", [](const policy& p) { return p.c.needs_wo(); },
                   "Whether it measures through W_O: select wants a metric or w_o.")
      .def_prop_ro("needs_every_query", [](const policy& p) { return p.c.observes_every_query() ||
                                                                     (p.c.reads_queries() && !p.c.observes()); },
                   "Whether it looks at every query that it is given, not at the window's alone.")
      .def_prop_ro("per_query_head", [](const policy& p) { return p.c.per_query_head(); },
                   "Whether each query head has a kept set of its own.")
      .def_prop_ro("over_layers", [](const policy& p) { return p.c.over_layers(); },
                   "Whether its budget is one over all layers of a model: for `select_layers` and `ModelSelection`, "
                   "not for `select`.")
      .def("keys", &dict_of, nb::sig("def keys(self) -> dict[str, bool | int | float | str]"),
           "Every key with its value; `policy(**p.keys())` is equal to p.")
      .def("replace", &replaced, nb::sig("def replace(self, **keys: bool | int | float | str | None) -> Policy"),
           "The same with other keys. Another method brings its own defaults; budget and window stay.\n\n"
           "Raises Error for unknown keys and values.")
      .def("__repr__", &shown)
      .def("__eq__",
           [](const policy& a, nb::handle other) {
             return nb::isinstance<policy>(other) && a.text == nb::cast<const policy&>(other).text;
           },
           nb::arg("other").none(), nb::sig("def __eq__(self, other: object, /) -> bool"))
      .def("__hash__", [](const policy& p) { return nb::hash(nb::str(p.text.c_str())); })
      .def("__getstate__", [](const policy& p) { return nb::make_tuple(p.name, p.text); },
           nb::sig("def __getstate__(self) -> tuple[str, str]"))
      .def("__setstate__",
           [](policy& p, const nb::tuple& state) {
             new (&p) policy(from_text(nb::cast<std::string>(state[0]), nb::cast<std::string>(state[1])));
           },
           nb::sig("def __setstate__(self, state: tuple[str, str], /) -> None"));

  m.def("policy", &new_policy, nb::arg("name") = nb::none(), nb::arg("budget") = nb::none(), nb::arg("keys"),
        nb::sig("def policy(name: str | None = None, budget: int | None = None, "
                "**keys: bool | int | float | str | None) -> Policy"),
        R"(A policy by its name (see `policies`; a method's name does, too), with other keys.

name: 'standard' where neither it nor a method is given. budget: tokens kept per head, window and sinks included,
1024 where it is left out; compression_ratio=0.9 instead evicts nine of ten tokens; 'full_cache' keeps all of them,
whatever is said. keys: those of the case files and of the program's options, such as method, order, temporal,
spatial, kernel, group, window, allocation, floor, n_sink, recent, unit, shared, seed. A key that is None is left as
it is.

Raises Error for names, keys and values that are not known.)");
  m.def("policies", &all_policies, nb::sig("def policies() -> dict[str, str]"),
        "The policies that have a name, with a line on each. Those with `over_layers` choose from a whole model.");
}

}  // namespace restkv::python
