// Reads machine code: for which architecture it is, and what parameters its kernels have.
#include <elf.h>

#include <algorithm>
#include <cstring>

#include "fake_driver.h"

namespace fake {
namespace {

constexpr uint8_t kSized = 4;             // format of entries whose value follows
constexpr uint8_t kParameterInfo = 0x17;  // EIATTR_KPARAM_INFO
constexpr uint8_t kThreads = 0x10;        // EIATTR_REQNTID
constexpr uint8_t kMostThreads = 0x05;    // EIATTR_MAX_THREADS

template <class T>
T read(const char* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

Elf64_Shdr section(const char* image, int index) {
  return read<Elf64_Shdr>(image + read<Elf64_Ehdr>(image).e_shoff + index * sizeof(Elf64_Shdr));
}

}  // namespace

std::string copy_image(const char* image) {
  if (std::memcmp(image, ELFMAG, SELFMAG) != 0) return {};
  const auto header = read<Elf64_Ehdr>(image);
  uint64_t end = std::max(header.e_shoff + header.e_shnum * sizeof(Elf64_Shdr),
                          header.e_phoff + header.e_phnum * sizeof(Elf64_Phdr));
  for (int i = 0; i < header.e_shnum; i++) {
    const Elf64_Shdr s = section(image, i);
    if (s.sh_type != SHT_NOBITS) end = std::max(end, s.sh_offset + s.sh_size);
  }
  return std::string(image, end);
}

int architecture(const std::string& image) {
  const auto header = read<Elf64_Ehdr>(image.data());
  const bool old = header.e_ident[EI_ABIVERSION] < 8;
  return static_cast<int>(old ? header.e_flags & 0xFF : header.e_flags >> 8 & 0xFF);
}

bool runs_on(const std::string& image, int device) {
  const int built = architecture(image);
  if (built == device) return true;
  if (built / 10 != device / 10 || built > device) return false;
  if (built < 90) return true;
  const size_t found = image.find("-arch sm_");  // compilers note how they were called
  if (found == std::string::npos) return false;
  const char suffix = image[image.find_first_not_of("0123456789", found + 9)];
  return suffix == ' ' || (suffix == 'f' && (device == 103 || device == 121));
}

bool read_function(const std::string& image, Function* function) {
  const auto header = read<Elf64_Ehdr>(image.data());
  const char* names = image.data() + section(image.data(), header.e_shstrndx).sh_offset;
  for (int i = 0; i < header.e_shnum; i++) {
    const Elf64_Shdr info = section(image.data(), i);
    if (names + info.sh_name != ".nv.info." + function->entry) continue;
    const char* at = image.data() + info.sh_offset;
    const char* const end = at + info.sh_size;
    while (at < end) {
      const auto format = static_cast<uint8_t>(at[0]), attribute = static_cast<uint8_t>(at[1]);
      const char* value = at + 4;
      if (format == kSized && attribute == kParameterInfo) {
        const size_t ordinal = read<uint16_t>(value + 4);
        if (function->parameters.size() <= ordinal) function->parameters.resize(ordinal + 1);
        const uint32_t size = read<uint32_t>(value + 8) >> 18;
        function->parameters[ordinal] = {read<uint16_t>(value + 6), size};
      } else if (format == kSized && attribute == kThreads) {
        function->threads = read<uint32_t>(value);
      } else if (format == kSized && attribute == kMostThreads) {
        function->threads = read<uint32_t>(value);
        function->at_most = true;
      }
      at = value + (format == kSized ? read<uint16_t>(at + 2) : 0);
    }
    return true;
  }
  return false;
}

}  // namespace fake
