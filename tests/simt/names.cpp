// Names of kernels for messages. They are static functions, which dladdr does not know: their names
// are only in the symbol table of the module's file.
#include <cxxabi.h>
#include <dlfcn.h>
#include <elf.h>

#include <cstdlib>
#include <fstream>
#include <iterator>

#include "machine.h"

namespace simt {
namespace {

const char* symbol_at(const std::string& file, uint64_t offset) {
  const auto* const header = reinterpret_cast<const Elf64_Ehdr*>(file.data());
  const auto* const sections = reinterpret_cast<const Elf64_Shdr*>(file.data() + header->e_shoff);
  for (int i = 0; i < header->e_shnum; ++i) {
    if (sections[i].sh_type != SHT_SYMTAB) continue;
    const auto* const symbols =
        reinterpret_cast<const Elf64_Sym*>(file.data() + sections[i].sh_offset);
    const char* const names = file.data() + sections[sections[i].sh_link].sh_offset;
    for (uint64_t j = 0; j < sections[i].sh_size / sizeof(Elf64_Sym); ++j) {
      const bool function = ELF64_ST_TYPE(symbols[j].st_info) == STT_FUNC;
      if (function && symbols[j].st_value == offset) return names + symbols[j].st_name;
    }
  }
  return nullptr;
}

// Without the parameters and the namespaces, which say nothing here.
std::string shortened(std::string name) {
  name = name.substr(0, name.rfind('('));
  for (const char* word : {"(anonymous namespace)::", "pgolf::cuda::", "pgolf::", "void "}) {
    for (size_t at; (at = name.find(word)) != std::string::npos;) {
      name.erase(at, std::char_traits<char>::length(word));
    }
  }
  return name;
}

}  // namespace

std::string name_of(const void* function) {
  Dl_info module;
  if (dladdr(function, &module) == 0) return "?";
  std::ifstream stream(module.dli_fname, std::ios::binary);
  const std::string file{std::istreambuf_iterator<char>(stream), {}};
  const auto offset = reinterpret_cast<uint64_t>(function) -
                      reinterpret_cast<uint64_t>(module.dli_fbase);
  const char* const symbol = file.empty() ? nullptr : symbol_at(file, offset);
  if (symbol == nullptr) return std::to_string(offset);
  int status = 0;
  char* const readable = abi::__cxa_demangle(symbol, nullptr, nullptr, &status);
  const std::string name = readable ? shortened(readable) : symbol;
  std::free(readable);
  return name;
}

}  // namespace simt
