// The two index builders whose loops are too slow in Python. Each has a Python version in sample_index.py or
// blending.py that gives the same bits; a test compares them.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

namespace py = pybind11;

template <typename T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

namespace {

// Sample k is the seq_length + 1 tokens from token k * seq_length of the documents laid end to end; row k of the
// result says where that token lies: (position in document_index, offset in that document). Documents without
// tokens are stepped over, except that row 0 is always (0, 0), as in Megatron-LM's helpers.cpp.
template <typename T>
py::array_t<T> sample_index(const Array<int32_t>& sizes, const Array<int32_t>& document_index,
                            int64_t seq_length, int64_t num_samples) {
  if (seq_length < 1 || num_samples < 0) throw std::invalid_argument("seq_length < 1 or num_samples < 0");
  py::array_t<T> result({static_cast<py::ssize_t>(num_samples + 1), static_cast<py::ssize_t>(2)});
  auto size = sizes.unchecked<1>();
  auto document = document_index.unchecked<1>();
  auto row = result.template mutable_unchecked<2>();
  const int64_t num_sizes = sizes.shape(0), num_documents = document_index.shape(0);
  if (num_documents - 1 > static_cast<int64_t>(std::numeric_limits<T>::max()))
    throw std::invalid_argument("document_index is too long for 32-bit rows");
  {
    py::gil_scoped_release release;
    row(0, 0) = row(0, 1) = 0;
    int64_t position = 0, offset = 0;
    for (int64_t k = 1; k <= num_samples; ++k) {
      offset += seq_length;
      for (;;) {
        if (position >= num_documents) throw std::out_of_range("the documents end before the last sample");
        const int32_t id = document(position);
        if (id < 0 || id >= num_sizes) throw std::out_of_range("document id " + std::to_string(id));
        if (offset < size(id)) break;
        offset -= size(id);
        ++position;
      }
      row(k, 0) = static_cast<T>(position);
      row(k, 1) = static_cast<T>(offset);
    }
  }
  return result;
}

// Give every next sample to the dataset that lags most behind its weight; the first of equals wins.
py::tuple blending_index(const Array<double>& weights, int64_t num_samples) {
  if (num_samples < 0) throw std::invalid_argument("num_samples < 0");
  const int64_t num_datasets = weights.shape(0);
  if (num_datasets < 1 || num_datasets > std::numeric_limits<int16_t>::max())
    throw std::invalid_argument("1 to 32767 datasets");
  py::array_t<int16_t> dataset(num_samples);
  py::array_t<int64_t> sample(num_samples);
  auto weight = weights.unchecked<1>();
  auto dataset_of = dataset.mutable_unchecked<1>();
  auto sample_of = sample.mutable_unchecked<1>();
  {
    py::gil_scoped_release release;
    std::vector<int64_t> given(num_datasets, 0);
    for (int64_t i = 0; i < num_samples; ++i) {
      const double wanted_total = std::max<double>(static_cast<double>(i), 1.0);
      int64_t best = 0;
      double best_lag = 0;
      for (int64_t d = 0; d < num_datasets; ++d) {
        // volatile: a fused multiply-subtract would round once instead of twice, and Python rounds twice.
        volatile double wanted = weight(d) * wanted_total;
        const double lag = wanted - static_cast<double>(given[d]);
        if (d == 0 || lag > best_lag) {
          best = d;
          best_lag = lag;
        }
      }
      dataset_of(i) = static_cast<int16_t>(best);
      sample_of(i) = given[best]++;
    }
  }
  return py::make_tuple(dataset, sample);
}

}  // namespace

PYBIND11_MODULE(_index_helpers, m) {
  m.doc() = "Loops of the data indices; see megatron/data/sample_index.py and blending.py.";
  m.def("sample_index_int32", &sample_index<int32_t>, py::arg("sizes"), py::arg("document_index"),
        py::arg("seq_length"), py::arg("num_samples"));
  m.def("sample_index_int64", &sample_index<int64_t>, py::arg("sizes"), py::arg("document_index"),
        py::arg("seq_length"), py::arg("num_samples"));
  m.def("blending_index", &blending_index, py::arg("weights"), py::arg("num_samples"));
}
