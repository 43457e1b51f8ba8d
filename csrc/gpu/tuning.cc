#include "gpu/tuning.h"

#include <algorithm>
#include <charconv>
#include <cstring>
#include <string_view>
#include <unordered_map>

namespace twinfuse::gpu {

std::atomic<int> tuning{0};

namespace {

uint64_t mix(uint64_t hash, uint64_t value) {
  hash = (hash ^ value) * 0x9E3779B97F4A7C15;
  return hash ^ hash >> 32;
}

uint64_t hash_of(std::string_view text) {  // FNV-1a
  uint64_t hash = 0xCBF29CE484222325;
  for (const unsigned char c : text) hash = (hash ^ c) * 0x100000001B3;
  return hash;
}

// The nearest of 1, 1.5, 2, 3, 4, 6, 8, ...: the border between two neighbours is their mean.
int64_t round_extent(int64_t extent) {
  if (extent < 3) return extent;
  int64_t power = 2;
  while (extent / power >= 2) power *= 2;
  if (4 * extent < 5 * power) return power;
  return 4 * extent < 7 * power ? power / 2 * 3 : power * 2;
}

// What keys are made of, whether it comes from a call or from a text.
class Key {
 public:
  explicit Key(int architecture) : hash_(mix(0, static_cast<uint64_t>(architecture))) {}

  void label(uint64_t hash) { hash_ = mix(hash_, hash); }
  void extents(const int64_t* values, int count, bool rounded) {
    hash_ = mix(hash_, rounded);
    for (int i = 0; i < count; i++)
      hash_ = mix(hash_, static_cast<uint64_t>(rounded ? round_extent(values[i]) : values[i]));
  }
  uint64_t value() const { return hash_ ? hash_ : 1; }  // zero stands for none

 private:
  uint64_t hash_;
};

// Of a kernel's name, which is its role, a dash and its tile.
struct Name {
  uint64_t role, whole;
  size_t role_length;
};

Name name_of(const char* text) {
  const char* dash = strrchr(text, '-');
  const size_t length = dash ? static_cast<size_t>(dash - text) : strlen(text);
  return {hash_of({text, length}), hash_of(text), length};
}

Name name_of(const Kernel& kernel) {
  static const auto& names = *[] {  // never destroyed: threads may outlive static objects
    auto* list = new std::vector<Name>;
    for (int i = 0; i < kKernelCount; i++) list->push_back(name_of(kKernels[i].name));
    return list;
  }();
  const std::less<const Kernel*> before;
  const bool listed = !before(&kernel, kKernels) && before(&kernel, kKernels + kKernelCount);
  return listed ? names[static_cast<size_t>(&kernel - kKernels)] : name_of(kernel.name);
}

struct Measured {
  uint64_t kernel;  // hash of its name
  int splits;
};
using Table = std::unordered_map<uint64_t, Measured>;

// A table that calls may read is never changed nor freed: there is a new one for each file that is
// read and each end of tuning.
std::atomic<const Table*> table{nullptr};
std::mutex table_mutex;

void publish(const Table* made) {
  static auto& kept = *new std::vector<const Table*>;  // calls may outlive static objects
  const bool before = table.load(std::memory_order_relaxed) != nullptr;
  if (made) kept.push_back(made);
  table.store(made, std::memory_order_release);
  tuning.fetch_add((made != nullptr) - before);
}

// A problem that a thread has met, with its candidates as lines of text.
struct Noted {
  uint64_t key;
  std::string lines;
  bool ran = false;
};

struct Session {
  std::vector<Noted> noted;
  std::string told;  // what `twinfuse_tune_record` has returned
  std::unordered_map<uint64_t, Measured> forced;

  Session() { tuning.fetch_add(1); }
  ~Session() { tuning.fetch_sub(1); }

  Noted* find(uint64_t key) {
    for (Noted& one : noted)
      if (one.key == key) return &one;
    return nullptr;
  }
};
thread_local std::unique_ptr<Session> session;

void add_line(std::string& lines, const std::string& problem, const char* name, int splits,
              bool taken) {
  lines +=
      problem + '\t' + name + '\t' + std::to_string(splits) + '\t' + (taken ? "1" : "0") + '\n';
}

// What measurements have to say on a problem, the most certain first.
template <class Accept>
bool ask(const Problem& problem, uint64_t exact, const Accept& accept) {
  if (session) {
    const auto found = session->forced.find(exact);
    if (found != session->forced.end() && accept(found->second)) return true;
  }
  const Table* known = table.load(std::memory_order_acquire);
  if (!known) return false;
  auto found = known->find(exact);
  if (found != known->end() && accept(found->second)) return true;
  found = known->find(problem.rounded());
  return found != known->end() && accept(found->second);
}

// Numbers of a text, and the rest of it.
bool read_number(std::string_view& text, int64_t* value) {
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), *value);
  if (error != std::errc() || *value < 0) return false;
  text.remove_prefix(static_cast<size_t>(end - text.data()));
  return true;
}

std::string_view cut(std::string_view& text, char separator) {
  const size_t end = std::min(text.find(separator), text.size());
  const std::string_view part = text.substr(0, end);
  text.remove_prefix(std::min(end + 1, text.size()));
  return part;
}

// The keys of a problem's text. False: it is none.
bool read_problem(std::string_view text, uint64_t* exact, uint64_t* rounded) {
  std::string_view architecture = cut(text, ' '), labels = cut(text, ' ');
  int64_t number = 0, extents[8];
  if (architecture.substr(0, 3) != "sm_") return false;
  architecture.remove_prefix(3);
  if (!read_number(architecture, &number) || !architecture.empty() || labels.empty()) return false;
  Key key(static_cast<int>(number));
  while (!labels.empty()) key.label(hash_of(cut(labels, '+')));
  int count = 0;
  while (!text.empty()) {
    std::string_view extent = cut(text, 'x');
    if (count == 8 || !read_number(extent, &extents[count++]) || !extent.empty()) return false;
  }
  Key near = key;
  key.extents(extents, count, false);
  near.extents(extents, count, true);
  *exact = key.value();
  *rounded = near.value();
  return count > 0;
}

// Lines of "problem <tab> kernel <tab> splits", and more behind another tab.
int read_choices(std::string_view text, Table& into) {
  int understood = 0;
  while (!text.empty()) {
    std::string_view line = cut(text, '\n');
    const std::string_view problem = cut(line, '\t'), kernel = cut(line, '\t');
    std::string_view splits = cut(line, '\t');
    uint64_t exact = 0, rounded = 0;
    int64_t count = 0;
    if (!read_problem(problem, &exact, &rounded) || kernel.empty() ||
        !read_number(splits, &count) || count > INT32_MAX)
      continue;
    // The last one of a class speaks for it.
    into[exact] = into[rounded] = {hash_of(kernel), static_cast<int>(count)};
    understood++;
  }
  return understood;
}

void load_built_in() {
  static std::once_flag once;
  std::call_once(once, [] {
    auto made = std::make_unique<Table>();
    read_choices(kMeasured, *made);
    const std::lock_guard lock(table_mutex);
    if (!made->empty()) publish(made.release());
  });
}

std::atomic<TwinfuseOnDevice> on_device{nullptr};

}  // namespace

void Problem::add_label(const char* text) {
  if (label_count_ < kMostLabels) labels_[label_count_++] = {hash_of(text), text, strlen(text)};
}

void Problem::add_role(const Kernel& kernel) {
  const Name name = name_of(kernel);
  if (label_count_ == kMostLabels) return;
  if (label_count_ && labels_[label_count_ - 1].hash == name.role) return;
  labels_[label_count_++] = {name.role, kernel.name, name.role_length};
}

uint64_t Problem::key(bool rounded) const {
  Key key(architecture_);
  for (int i = 0; i < label_count_; i++) key.label(labels_[i].hash);
  key.extents(extents_.values, extents_.count, rounded);
  return key.value();
}

std::string Problem::text() const {
  std::string text = "sm_" + std::to_string(architecture_);
  for (int i = 0; i < label_count_; i++)
    (text += i ? '+' : ' ').append(labels_[i].text, labels_[i].length);
  for (int i = 0; i < extents_.count; i++)
    (text += i ? 'x' : ' ') += std::to_string(extents_.values[i]);
  return text;
}

void Candidates::add(const Kernel& kernel, const Shape& shape) {
  const bool cut = kernel.role.store == Writer::split;
  const int splits = cut ? most_splits(device_, kernel, shape) : 1;
  best_.improve({&kernel, splits, estimate(device_, kernel, shape, splits)});
  if (!best_.first) best_.first = &kernel;
  if (!tuned_ || count_ == kMost) return;
  problem_.add_role(kernel);
  const int most = cut ? possible_splits(device_, kernel, shape) : 1;
  candidates_[count_++] = {&kernel, splits, std::max(splits, most)};
}

void Candidates::add(const Role& role, const Shape& shape) {
  for (const Kernel* kernel : device_.find(role)) add(*kernel, shape);
}

Choice Candidates::choose() {
  if (!count_) return best_;
  const uint64_t exact = problem_.exact();
  Choice taken = best_;
  ask(problem_, exact, [&](const Measured& measured) {
    for (int i = 0; i < count_; i++) {
      const Candidate& c = candidates_[i];
      if (name_of(*c.kernel).whole != measured.kernel) continue;
      // The clocks stay: whoever compares plans compares estimates with estimates.
      taken.kernel = c.kernel;
      taken.splits = c.most_splits == 1 ? 1 : std::clamp(measured.splits, 2, c.most_splits);
      return true;
    }
    return false;
  });
  if (session) {
    taken.problem = exact;
    note(exact, taken);
  }
  return taken;
}

void Candidates::note(uint64_t key, const Choice& taken) const {
  if (session->find(key)) return;
  Noted noted{key, {}};
  const std::string problem = problem_.text();
  for (int i = 0; i < count_; i++) {
    const Candidate& c = candidates_[i];
    const bool own = c.kernel == taken.kernel;
    std::vector<int> splits{c.splits};
    if (own && taken.splits != c.splits) splits.push_back(taken.splits);
    for (int count = 2; count <= c.most_splits; count *= 2)
      if (std::find(splits.begin(), splits.end(), count) == splits.end()) splits.push_back(count);
    for (const int count : splits)
      add_line(noted.lines, problem, c.kernel->name, count, own && count == taken.splits);
  }
  session->noted.push_back(std::move(noted));
}

size_t estimate(const Ways& ways) {
  size_t best = 0;
  for (size_t i = 1; i < ways.size(); i++)
    if (ways.begin()[i].clocks < ways.begin()[best].clocks) best = i;
  return best;
}

size_t measured(const Problem& problem, const Ways& ways) {
  size_t best = estimate(ways);
  const uint64_t exact = problem.exact();
  ask(problem, exact, [&](const Measured& way) {
    for (size_t i = 0; i < ways.size(); i++) {
      if (hash_of(ways.begin()[i].name) != way.kernel) continue;
      best = i;
      return true;
    }
    return false;
  });
  if (session && !session->find(exact)) {
    Noted noted{exact, {}, true};
    const std::string text = problem.text();
    for (size_t i = 0; i < ways.size(); i++)  // no splits: this is no kernel
      add_line(noted.lines, text, ways.begin()[i].name, 0, i == best);
    session->noted.push_back(std::move(noted));
  }
  return best;
}

void note_run(uint64_t problem) {
  if (!session) return;
  if (Noted* noted = session->find(problem)) noted->ran = true;
}

void announce(const Device& device) {
  load_built_in();
  if (const TwinfuseOnDevice call = on_device.load()) call(device.name());
}

}  // namespace twinfuse::gpu

using namespace twinfuse::gpu;

// Exceptions (no memory) must not cross the C interface: then nothing has happened.
extern "C" const char* twinfuse_tune_record(void) try {
  if (!session) session = std::make_unique<Session>();
  session->told.clear();
  for (const Noted& noted : session->noted)
    if (noted.ran) session->told += noted.lines;
  session->noted.clear();
  return session->told.c_str();
} catch (const std::exception&) {
  return "";
}

extern "C" void twinfuse_tune_end(void) { session.reset(); }

extern "C" void twinfuse_tune_force(const char* problem, const char* kernel, int32_t splits) try {
  uint64_t exact = 0, rounded = 0;
  if (!session || !problem || !read_problem(problem, &exact, &rounded)) return;
  if (kernel)
    session->forced[exact] = {hash_of(kernel), splits};
  else
    session->forced.erase(exact);
} catch (const std::exception&) {
}

extern "C" int32_t twinfuse_tune_select(const char* choices) try {
  load_built_in();
  const std::lock_guard lock(table_mutex);
  const Table* known = table.load(std::memory_order_relaxed);
  auto made = std::make_unique<Table>();
  if (choices && known) *made = *known;
  const int understood = read_choices(choices ? choices : kMeasured, *made);
  publish(made->empty() ? nullptr : made.release());
  return understood;
} catch (const std::exception&) {
  return 0;
}

extern "C" void twinfuse_tune_on_device(TwinfuseOnDevice call) { on_device.store(call); }
