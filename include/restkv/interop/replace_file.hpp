// SPDX-License-Identifier: Apache-2.0
/// @file
/// `replace_file`: writes a file so that its name never stands for half of it. POSIX.
#pragma once

#include <restkv/core/status.hpp>

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <span>
#include <string>

namespace restkv {

/// Writes the pieces, one behind the other, to a new file beside `path`, flushes it to the disk and renames it to
/// `path`. When anything fails the new file is removed and a file that was there before is as it was.
///
/// Errors (errc::bad_file): a folder that does not exist or may not be written, a full disk, and a `path` that names
/// something other than a plain file (a folder, a device).
[[nodiscard]] inline status replace_file(const std::string& path,
                                         std::span<const std::span<const std::byte>> pieces) {
  const auto failure = [&](const char* what, int code) {
    return status::error(errc::bad_file, "%s: cannot %s: %s", path.c_str(), what, std::strerror(code));
  };
  struct stat before {};
  const bool existed = ::stat(path.c_str(), &before) == 0;
  if (existed && !S_ISREG(before.st_mode)) {
    return status::error(errc::bad_file, "%s: cannot be replaced: it is not a plain file", path.c_str());
  }
  std::string temporary = path + ".XXXXXX";
  const int file = ::mkstemp(temporary.data());
  if (file < 0) return failure("create a file beside it", errno);
  const auto give_up = [&](const char* what) {
    const int code = errno;
    ::close(file);
    ::unlink(temporary.c_str());
    return failure(what, code);
  };
  // mkstemp makes the file readable by its owner alone: give it the rights a plain open would have given.
  const mode_t mask = ::umask(0);
  ::umask(mask);
  if (::fchmod(file, existed ? before.st_mode & 07777 : 0666 & ~mask) != 0) return give_up("set the rights of a file");
  for (const std::span<const std::byte> piece : pieces) {
    for (std::size_t done = 0; done < piece.size();) {
      const ssize_t written = ::write(file, piece.data() + done, piece.size() - done);
      if (written < 0 && errno == EINTR) continue;
      if (written < 0) return give_up("write");
      done += static_cast<std::size_t>(written);
    }
  }
  if (::fsync(file) != 0) return give_up("flush");
  if (::close(file) != 0) {
    const int code = errno;
    ::unlink(temporary.c_str());
    return failure("close", code);
  }
  if (::rename(temporary.c_str(), path.c_str()) != 0) {
    const int code = errno;
    ::unlink(temporary.c_str());
    return failure("rename a file to it", code);
  }
  // The rename itself reaches the disk with the folder. A file system that cannot do this has nothing to lose by it.
  const std::size_t slash = path.rfind('/');
  const std::string folder = slash == std::string::npos ? "." : path.substr(0, slash + 1);
  if (const int handle = ::open(folder.c_str(), O_RDONLY | O_DIRECTORY); handle >= 0) {
    static_cast<void>(::fsync(handle));
    ::close(handle);
  }
  return {};
}

/// The same for a text.
[[nodiscard]] inline status replace_file(const std::string& path, const std::string& text) {
  const std::span<const std::byte> piece = std::as_bytes(std::span(text));
  return replace_file(path, std::span(&piece, 1));
}

}  // namespace restkv
