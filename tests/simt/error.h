// Errors, and the place in a kernel that they are about.
#pragma once
#include <cstdarg>
#include <cstdio>
#include <stdexcept>
#include <string>

namespace simt {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// As a default argument, `Site at = Site::here()` is the caller's own file and line.
struct Site {
  const char* file;
  int line;

  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

__attribute__((format(printf, 1, 2))) inline std::string format(const char* pattern, ...) {
  char text[1024];
  va_list values;
  va_start(values, pattern);
  std::vsnprintf(text, sizeof text, pattern, values);
  va_end(values);
  return text;
}

inline std::string name(const Site& at) {
  std::string file = at.file;
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(at.line);
}

}  // namespace simt
