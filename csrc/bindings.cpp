// Names of the compiled kernels, and nothing else: they are reached from Python as torch.ops.fastclip_cpu.<name>.
#include <torch/library.h>
#include <torch/version.h>

#include <optional>
#include <string>
#include <tuple>

namespace fastclip {

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> contrastive_loss_statistics(
    const at::Tensor& image_features, const at::Tensor& text_features, const at::Tensor& logit_scale, int64_t offset,
    const std::optional<at::Tensor>& labels, const std::optional<at::Tensor>& row_groups, const std::optional<at::Tensor>& col_groups,
    const std::optional<at::Tensor>& kept);
std::tuple<at::Tensor, at::Tensor> contrastive_loss_negative_gradients(
    const at::Tensor& image_features, const at::Tensor& text_features, const at::Tensor& logit_scale, const at::Tensor& row_lse,
    const at::Tensor& col_lse, const at::Tensor& d_row_lse, const at::Tensor& d_col_lse, int64_t offset,
    const std::optional<at::Tensor>& labels, const std::optional<at::Tensor>& row_groups, const std::optional<at::Tensor>& col_groups,
    const std::optional<at::Tensor>& kept);
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> contrastive_loss_statistics_and_largest(
    const at::Tensor& image_features, const at::Tensor& text_features, const at::Tensor& logit_scale, int64_t offset,
    const std::optional<at::Tensor>& labels, const std::optional<at::Tensor>& row_groups, const std::optional<at::Tensor>& col_groups);
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> contrastive_loss_skipping_gradients(
    const at::Tensor& image_features, const at::Tensor& text_features, const at::Tensor& logit_scale, const at::Tensor& row_lse,
    const at::Tensor& col_lse, const at::Tensor& d_row_lse, const at::Tensor& d_col_lse, int64_t offset,
    const std::optional<at::Tensor>& labels, const std::optional<at::Tensor>& row_groups, const std::optional<at::Tensor>& col_groups,
    const at::Tensor& largest, double tolerance);
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> contrastive_loss_mean(const at::Tensor& image_features,
                                                                                 const at::Tensor& text_features,
                                                                                 const at::Tensor& logit_scale);
at::Tensor sigmoid_loss(const at::Tensor& image_features, const at::Tensor& text_features, const at::Tensor& logit_scale,
                        const at::Tensor& logit_bias, const std::optional<at::Tensor>& row_groups,
                        const std::optional<at::Tensor>& col_groups, int64_t offset);
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> sigmoid_loss_gradients(
    const at::Tensor& image_features, const at::Tensor& text_features, const at::Tensor& logit_scale, const at::Tensor& logit_bias,
    const std::optional<at::Tensor>& row_groups, const std::optional<at::Tensor>& col_groups, int64_t offset, const at::Tensor& weights);
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> sigmoid_loss_mean(const at::Tensor& image_features,
                                                                                         const at::Tensor& text_features,
                                                                                         const at::Tensor& logit_scale,
                                                                                         const at::Tensor& logit_bias);
at::Tensor attention_fwd(const at::Tensor& qkv, const std::optional<at::Tensor>& cu_seqlens, int64_t max_seqlen, bool causal,
                         double softmax_scale);
at::Tensor attention_bwd(const at::Tensor& d_out, const at::Tensor& qkv, const std::optional<at::Tensor>& cu_seqlens, int64_t max_seqlen,
                         bool causal, double softmax_scale);
at::Tensor pooled_attention_fwd(const at::Tensor& q, const at::Tensor& kv, const std::optional<at::Tensor>& cu_seqlens, int64_t max_seqlen,
                                double softmax_scale);
std::tuple<at::Tensor, at::Tensor> pooled_attention_bwd(const at::Tensor& d_out, const at::Tensor& q, const at::Tensor& kv,
                                                        const std::optional<at::Tensor>& cu_seqlens, int64_t max_seqlen, double softmax_scale);
at::Tensor activation_fwd(const at::Tensor& x, const std::optional<at::Tensor>& bias, c10::string_view kind);
std::tuple<at::Tensor, at::Tensor> activation_bwd(const at::Tensor& d_out, const at::Tensor& x, const std::optional<at::Tensor>& bias,
                                                  c10::string_view kind);
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> layer_norm_fwd(const at::Tensor& x, const std::optional<at::Tensor>& residual,
                                                                          const at::Tensor& weight, const at::Tensor& bias, double eps);
std::tuple<at::Tensor, at::Tensor, at::Tensor> layer_norm_bwd(const at::Tensor& d_out, const std::optional<at::Tensor>& d_total,
                                                              const at::Tensor& total, const at::Tensor& weight, const at::Tensor& mean,
                                                              const at::Tensor& rstd);

}  // namespace fastclip

TORCH_LIBRARY(fastclip_cpu, m) {
  m.def("torch_version() -> str", [] { return std::string(TORCH_VERSION); });
  m.def(
      "contrastive_loss_statistics(Tensor image_features, Tensor text_features, Tensor logit_scale, int offset, Tensor? labels,"
      " Tensor? row_groups, Tensor? col_groups, Tensor(a!)? kept) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
      &fastclip::contrastive_loss_statistics);
  m.def(
      "contrastive_loss_negative_gradients(Tensor image_features, Tensor text_features, Tensor logit_scale, Tensor row_lse,"
      " Tensor col_lse, Tensor d_row_lse, Tensor d_col_lse, int offset, Tensor? labels, Tensor? row_groups, Tensor? col_groups,"
      " Tensor? kept)"
      " -> (Tensor, Tensor)",
      &fastclip::contrastive_loss_negative_gradients);
  m.def(
      "contrastive_loss_statistics_and_largest(Tensor image_features, Tensor text_features, Tensor logit_scale, int offset,"
      " Tensor? labels, Tensor? row_groups, Tensor? col_groups) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
      &fastclip::contrastive_loss_statistics_and_largest);
  m.def(
      "contrastive_loss_skipping_gradients(Tensor image_features, Tensor text_features, Tensor logit_scale, Tensor row_lse,"
      " Tensor col_lse, Tensor d_row_lse, Tensor d_col_lse, int offset, Tensor? labels, Tensor? row_groups, Tensor? col_groups,"
      " Tensor largest, float tolerance) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
      &fastclip::contrastive_loss_skipping_gradients);
  m.def(
      "contrastive_loss_mean(Tensor image_features, Tensor text_features, Tensor logit_scale) -> (Tensor, Tensor, Tensor, Tensor)",
      &fastclip::contrastive_loss_mean);
  m.def(
      "sigmoid_loss(Tensor image_features, Tensor text_features, Tensor logit_scale, Tensor logit_bias, Tensor? row_groups,"
      " Tensor? col_groups, int offset) -> Tensor",
      &fastclip::sigmoid_loss);
  m.def(
      "sigmoid_loss_gradients(Tensor image_features, Tensor text_features, Tensor logit_scale, Tensor logit_bias,"
      " Tensor? row_groups, Tensor? col_groups, int offset, Tensor weights) -> (Tensor, Tensor, Tensor, Tensor)",
      &fastclip::sigmoid_loss_gradients);
  m.def(
      "sigmoid_loss_mean(Tensor image_features, Tensor text_features, Tensor logit_scale, Tensor logit_bias)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
      &fastclip::sigmoid_loss_mean);
  m.def("attention_fwd(Tensor qkv, Tensor? cu_seqlens, int max_seqlen, bool causal, float softmax_scale) -> Tensor",
        &fastclip::attention_fwd);
  m.def("attention_bwd(Tensor d_out, Tensor qkv, Tensor? cu_seqlens, int max_seqlen, bool causal, float softmax_scale) -> Tensor",
        &fastclip::attention_bwd);
  m.def("pooled_attention_fwd(Tensor q, Tensor kv, Tensor? cu_seqlens, int max_seqlen, float softmax_scale) -> Tensor",
        &fastclip::pooled_attention_fwd);
  m.def(
      "pooled_attention_bwd(Tensor d_out, Tensor q, Tensor kv, Tensor? cu_seqlens, int max_seqlen, float softmax_scale)"
      " -> (Tensor, Tensor)",
      &fastclip::pooled_attention_bwd);
  m.def("activation_fwd(Tensor x, Tensor? bias, str kind) -> Tensor", &fastclip::activation_fwd);
  m.def("activation_bwd(Tensor d_out, Tensor x, Tensor? bias, str kind) -> (Tensor, Tensor)", &fastclip::activation_bwd);
  m.def("layer_norm_fwd(Tensor x, Tensor? residual, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
        &fastclip::layer_norm_fwd);
  m.def("layer_norm_bwd(Tensor d_out, Tensor? d_total, Tensor total, Tensor weight, Tensor mean, Tensor rstd) -> (Tensor, Tensor, Tensor)",
        &fastclip::layer_norm_bwd);
}
