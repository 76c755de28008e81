// The operators that operators.cpp registers with PyTorch. Each computes what its reference in kernels/operators computes,
// where it is declared.
#pragma once

#include <optional>
#include <string>
#include <tuple>

#include "tensors.h"

namespace kernels {

Tensor quantize(const Tensor& values, const Tensor& scale, const Tensor& zero_point, int64_t lowest, int64_t highest,
                ScalarType dtype, int64_t axis);

Tensor dequantize(const Tensor& codes, const Tensor& scale, const Tensor& zero_point, int64_t axis,
                  ScalarType dtype);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> fake_quantize(
    const Tensor& input, const std::optional<Tensor>& addend, const Tensor& scale, const Tensor& zero_point,
    int64_t lowest, int64_t highest, int64_t axis, double clip_low, double clip_high, bool wants_values,
    bool wants_mask, bool wants_extremes, std::optional<ScalarType> code_dtype);

Tensor mask_gradient(const Tensor& gradient, const Tensor& mask, Shape strides, std::optional<double> gradient_clip);

std::tuple<Tensor, Tensor, Tensor> fake_quantize_backward(const Tensor& gradient, const Tensor& input,
                                                          const Tensor& scale, const Tensor& zero_point,
                                                          int64_t lowest, int64_t highest, int64_t axis,
                                                          bool pass_saturated, std::optional<double> gradient_clip,
                                                          bool needs_input);

Tensor mask_weight_gradient(const Tensor& gradient, const Tensor& weight, const Tensor& scale,
                            const Tensor& zero_point, int64_t lowest, int64_t highest, int64_t axis,
                            bool pass_saturated, std::optional<double> gradient_clip);

void update_moving_average(const Tensor& batch, bool is_measured, int64_t axis, const Tensor& minimum,
                           const Tensor& maximum, const Tensor& batches, const Tensor& scale,
                           const Tensor& zero_point, double momentum, int64_t lowest, int64_t highest, bool symmetric,
                           int64_t symmetric_zero, bool due);

Tensor extremes(const Tensor& input, int64_t axis);

std::vector<int64_t> fingerprints(std::vector<Tensor> tensors);

Tensor lookup(const Tensor& codes, const Tensor& table);

Tensor lookup_gradient(const Tensor& gradient, const Tensor& codes, const Tensor& slopes,
                       std::optional<double> gradient_clip);

Tensor occurring(const Tensor& codes);

Tensor add(const Tensor& left, const Tensor& left_ratio, const Tensor& right, const Tensor& right_ratio,
           const Tensor& constant, int64_t lowest, int64_t highest, ScalarType dtype);

Tensor requantize(const Tensor& sums, const std::optional<Tensor>& bias, const Tensor& multiplier, int64_t zero_point,
                  int64_t lowest, int64_t highest, ScalarType dtype, int64_t channel_axis);

Tensor max_pool2d(const Tensor& codes, Shape kernel, Shape stride, Shape padding, Shape dilation, bool ceil_mode);

Tensor sum_positions(const Tensor& codes);

Tensor average_positions(const Tensor& codes, const Tensor& zero_point, const Tensor& scale, const Tensor& output_scale,
                         const Tensor& output_zero_point, int64_t lowest, int64_t highest, ScalarType dtype);

Tensor pack_layer(const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& multiplier, Shape stride, Shape padding,
                  Shape dilation, int64_t groups, int64_t input_zero_point, ScalarType input_dtype,
                  int64_t zero_point, double lowest, double highest, ScalarType dtype);

Tensor convolution(const Tensor& codes, const Tensor& layer);

Tensor linear(const Tensor& codes, const Tensor& layer);

Tensor packed_layer(const Tensor& codes, const Tensor& packed, int64_t channels, Shape kernel, Shape stride,
                    Shape padding, Shape dilation, int64_t groups, ScalarType dtype);

Tensor integer_layer(const Tensor& codes, const Tensor& zero_point, const Tensor& weight, const Tensor& bias,
                     const Tensor& multiplier, const std::optional<Tensor>& output_zero_point,
                     const std::optional<Tensor>& lowest, const std::optional<Tensor>& highest, double clip_low,
                     double clip_high, ScalarType dtype, Shape stride, Shape padding, Shape dilation, int64_t groups);

std::tuple<Tensor, Tensor, Tensor> train_layer(
    const Tensor& codes, const Tensor& grid, const Tensor& weight, const std::optional<Tensor>& bias, int64_t axis,
    const Tensor& minimum, const Tensor& maximum, const Tensor& batches, const Tensor& scale, const Tensor& zero_point,
    double momentum, int64_t lowest, int64_t highest, bool observes, bool wants_mask, Shape stride, Shape padding,
    Shape dilation, int64_t groups, ScalarType dtype);

Tensor weighted_product(const Tensor& codes, const Tensor& grid, const Tensor& weight, const Tensor& weight_scale,
                        const std::optional<Tensor>& bias, int64_t axis, int64_t lowest, int64_t highest, Shape stride,
                        Shape padding, Shape dilation, int64_t groups, ScalarType dtype);

int64_t make_program(int64_t inputs, Shape code, std::vector<Tensor> tensors, Shape outputs);

std::vector<Tensor> run_program(std::vector<Tensor> inputs, int64_t program);

void release_program(int64_t program);

std::tuple<Tensor, Tensor> batch_statistics(const Tensor& values, const std::optional<Tensor>& running_mean,
                                            const std::optional<Tensor>& running_variance, double momentum,
                                            double epsilon);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> normalize(
    const Tensor& values, const Tensor& mean, const Tensor& inverse_deviation, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& bias, const Tensor& scale, const Tensor& zero_point, int64_t lowest, int64_t highest,
    double clip_low, double clip_high, std::optional<ScalarType> code_dtype);

std::tuple<Tensor, Tensor, Tensor> normalize_backward(const Tensor& gradient, const Tensor& mask, const Tensor& values,
                                                      const Tensor& mean, const Tensor& inverse_deviation,
                                                      const std::optional<Tensor>& weight, double gradient_clip,
                                                      bool is_frozen);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> learned_normalize_backward(
    const Tensor& gradient, const Tensor& mask, const Tensor& values, const Tensor& mean,
    const Tensor& inverse_deviation, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
    const Tensor& scale, const Tensor& zero_point, int64_t lowest, int64_t highest, double clip_low, double clip_high,
    double gradient_clip, bool is_frozen);

std::tuple<Tensor, Tensor, Tensor> learned_clip_backward(
    const Tensor& gradient, const Tensor& mask, const Tensor& values, const std::optional<Tensor>& values_grid,
    const std::optional<Tensor>& addend, const std::optional<Tensor>& addend_grid, const Tensor& scale,
    const Tensor& zero_point, int64_t lowest, int64_t highest, double clip_low, double clip_high, double gradient_clip);

}  // namespace kernels
