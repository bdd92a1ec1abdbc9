#include "lowmoe/kernels/cpu/kv_pages.h"

#include <algorithm>

#include "lowmoe/kernels/cpu/kv_cache.h"

namespace lowmoe {

KvPages::KvPages(size_t n_layers, size_t n_kv_heads, size_t head_size, KvFormat format,
                 bool keys_only)
    : n_layers_(n_layers),
      n_kv_heads_(n_kv_heads),
      head_page_bytes_(lowmoe::head_bytes(format, head_size) * kPageTokens),
      format_(format),
      keys_only_(keys_only) {}

void KvPages::reserve(size_t n_tokens) {
  while (n_reserved() < n_tokens) {
    std::vector<Buffer<uint8_t>> page;
    for (size_t layer = 0; layer < n_layers_; layer++) {
      page.emplace_back((keys_only_ ? 1 : 2) * n_kv_heads_ * head_page_bytes_);
    }
    for (Buffer<uint8_t>& buffer : page) pages_.push_back(std::move(buffer));
  }
}

void KvPages::copy_from(const KvPages& other, size_t n_tokens) {
  reserve(n_tokens);
  const size_t n_pages = (n_tokens + kPageTokens - 1) / kPageTokens;
  for (size_t i = 0; i < n_pages * n_layers_; i++) {
    const Buffer<uint8_t>& page = other.pages_[i];
    std::copy_n(page.data(), page.size(), pages_[i].data());
  }
}

}  // namespace lowmoe
