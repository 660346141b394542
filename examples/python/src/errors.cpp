// SPDX-License-Identifier: Apache-2.0
#include "errors.hpp"

#include "command.hpp"

namespace restkv::python {

namespace {

nb::handle error_type;  // lives as long as the module, which is never unloaded

const char* name_of(errc code) noexcept {
  switch (code) {
    case errc::ok: return "ok";
    case errc::invalid_argument: return "invalid_argument";
    case errc::shape_mismatch: return "shape_mismatch";
    case errc::missing_input: return "missing_input";
    case errc::workspace_too_small: return "workspace_too_small";
    case errc::aliasing: return "aliasing";
    case errc::unsupported: return "unsupported";
    case errc::out_of_memory: return "out_of_memory";
    case errc::device_failure: return "device_failure";
    case errc::bad_file: return "bad_file";
    case errc::communication_failure: return "communication_failure";
  }
  return "unknown";
}

void raise(errc code, const char* text) {
  nb::object made = nb::borrow(error_type)(text);
  made.attr("code") = name_of(code);
  PyErr_SetObject(error_type.ptr(), made.ptr());
}

}  // namespace

std::string text_of(nb::handle object) {
  const nb::object text = nb::steal(PyObject_Str(object.ptr()));
  if (!text.is_valid()) nb::raise_python_error();
  return nb::cast<std::string>(text);
}

void add_errors(nb::module_& m) {
  nb::object type = nb::steal(PyErr_NewExceptionWithDoc(
      "restkv.Error",
      "What went wrong, where, with both numbers. `code` is the kind of failure: invalid_argument, shape_mismatch, "
      "missing_input, aliasing, unsupported, out_of_memory or device_failure.",
      PyExc_ValueError, nullptr));
  if (!type.is_valid()) nb::raise_python_error();
  type.attr("code") = "invalid_argument";  // of one that Python code makes
  m.attr("Error") = type;
  error_type = type.release();
  nb::register_exception_translator([](const std::exception_ptr& thrown, void*) {
    try {
      std::rethrow_exception(thrown);
    } catch (const failure& e) {
      raise(e.code(), e.what());
    } catch (const cli::input_error& e) {
      raise(e.code(), e.what());
    } catch (const error& e) {
      raise(e.code(), e.what());
    }
  });
}

}  // namespace restkv::python
