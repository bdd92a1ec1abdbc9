// The keys and values of a conversation, layer by layer, in pages of some hundred tokens.
//
// A page holds  [n_kv_heads][kPageTokens][head_bytes]  of keys, then as many of values, so that
// what one head reads lies in one piece and nothing moves when the conversation grows.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "lowmoe/kernels/cpu/buffer.h"
#include "lowmoe/kernels/cpu/isa.h"
#include "lowmoe/kernels/cpu/kv_cache.h"

namespace lowmoe {

class KvPages {
 public:
  static constexpr size_t kPageTokens = 256;

  // keys_only: keys serve as values too, and are all that is kept.
  KvPages(size_t n_layers, size_t n_kv_heads, size_t head_size, KvFormat format,
          bool keys_only = false);

  KvPages(const KvPages&) = delete;

  // Makes room for positions below n_tokens in all layers.  Throws std::bad_alloc.
  void reserve(size_t n_tokens);

  // Takes over what another of the same shape has of positions below n_tokens, which it has room
  // for.  Throws std::bad_alloc.
  void copy_from(const KvPages& other, size_t n_tokens);

  // Where the keys of positions page * kPageTokens on lie, head_bytes apart; values likewise.
  uint8_t* keys(size_t layer, size_t head, size_t page) const {
    return pages_[page * n_layers_ + layer].data() + head * head_page_bytes_;
  }
  uint8_t* values(size_t layer, size_t head, size_t page) const {
    return keys(layer, keys_only_ ? head : n_kv_heads_ + head, page);
  }
  bool fits(size_t n_layers, size_t n_kv_heads, size_t head_size, bool keys_only) const {
    return n_layers == n_layers_ && n_kv_heads == n_kv_heads_ && keys_only == keys_only_ &&
           head_page_bytes_ == lowmoe::head_bytes(format_, head_size) * kPageTokens;
  }
  bool is_like(const KvPages& other) const {
    return n_layers_ == other.n_layers_ && n_kv_heads_ == other.n_kv_heads_ &&
           keys_only_ == other.keys_only_ && format_ == other.format_ &&
           head_page_bytes_ == other.head_page_bytes_;
  }
  size_t head_bytes() const { return head_page_bytes_ / kPageTokens; }
  KvFormat format() const { return format_; }
  size_t n_reserved() const { return pages_.size() / n_layers_ * kPageTokens; }

 private:
  size_t n_layers_, n_kv_heads_, head_page_bytes_;
  KvFormat format_;
  bool keys_only_;
  std::vector<Buffer<uint8_t>> pages_;  // [page][layer]
};

}  // namespace lowmoe
