"""What plain code does with a parameter, as text: each line is tried on a stored parameter and on
the plain tensor. p: the parameter; g: one cut alike; h, m: plain, of its shape, floats and bools;
v: plain, its last dim; s: a plain scalar; q: a copy that may be written into."""

from __future__ import annotations

READ = """
p.norm() | p.norm(1) | p.norm(float('inf')) | p.norm(-float('inf')) | p.norm(3) | p.norm(0)
p.norm(dim=0) | p.norm(dim=1) | p.norm(dim=-1, keepdim=True) | torch.linalg.norm(p)
torch.linalg.vector_norm(p, 2, 0) | torch.linalg.matrix_norm(p) | p.sum() | p.sum(0) | p.sum(1)
p.sum(-1, keepdim=True) | p.sum((0, 1)) | p.nansum() | p.mean() | p.mean(0) | p.mean(1, True)
p.var() | p.std() | p.var(0) | p.std(1) | p.std(unbiased=False) | torch.var_mean(p, dim=0)
torch.std_mean(p) | p.max() | p.min() | p.amax() | p.amin() | p.amax(0) | p.amax(1) | p.max(0)
p.max(1) | p.min(0).indices | p.argmax() | p.argmin() | p.argmax(0) | p.argmax(1) | p.aminmax()
p.prod() | p.prod(0) | p.abs().max() | p.abs().mean() | p.median() | p.median(0) | p.mode(0)
p.quantile(0.3) | p.quantile(0.3, dim=0) | torch.nanquantile(p, 0.5) | p.kthvalue(1, 0)
p.sort(0) | p.sort(1) | p.argsort(0) | p.topk(1, 0) | p.topk(2) | p.flatten().topk(3) | p.msort()
p.cumsum(0) | p.cumsum(1) | p.cumprod(0) | p.cummax(0) | p.logcumsumexp(0) | p.diff(dim=0)
p.logsumexp(0) | p.logsumexp(1) | p.logsumexp((0, 1)) | p.softmax(0) | p.softmax(1)
p.log_softmax(-1) | torch.nn.functional.normalize(p, dim=0) | p.renorm(2, 0, 1.0)
torch.nn.functional.normalize(p, dim=1) | torch.histc(p, 5) | torch.unique(p.round()) | p.trace()
torch.histogram(p, 4) | torch.bincount((p.abs() * 3).long().flatten()) | p.nonzero()
p.count_nonzero() | (p > 0).sum() | (p > 0).sum(0) | (p > 0).any() | (p > 9).any()
(p > -9).all() | (p > 0).all() | (p > 0).any(0) | (p > 0).all(1) | torch.isnan(p).any()
p.isfinite().all() | (p > 0).float().mean() | (p > 0).count_nonzero(0) | p.isinf().sum()
(p == p).all() | p.gt(0) | p.item() if p.numel() == 1 else 0 | p.sum().item() | float(p.norm())
int((p > 0).sum()) | bool((p > 0).any()) | f"{p.detach().norm():.3f}" | str(p.detach().max())
p.tolist() | p.detach().numpy() | p.detach().cpu().numpy() | np.asarray(p.detach())
p.detach()[0].tolist() | p.norm().tolist() | 1 if p.sum() > 0 else 0 | max(p.max(), 0.0)
p.double() | p.float() | p.half() | p.t() | p.T | p.mT | p.transpose(0, 1) | p.permute(1, 0)
p.unsqueeze(0) | p.unsqueeze(-1) | p.view(-1) | p.flatten() | p.reshape(-1) | p.reshape(1, -1)
p.view(p.shape) | p.view_as(h) | p[0] | p[-1] | p[:1] | p[:, 0] | p[:, :2] | p[..., None]
p[None] | p[0, 0] | p[::2] | p[:, ::2] | p[m] | p[p > 0] | p[torch.tensor([0])]
p[:, torch.tensor([1, 0])] | p.masked_select(m) | p.diag() | p.index_select(0, torch.tensor([0]))
p.gather(0, torch.zeros(1, 3).long()) | p.take(torch.tensor([1])) | p.chunk(2) | p.split(1, 1)
p.unbind(1)[0] | p.narrow(0, 0, 1) | list(p)[0] | len(p) | p.squeeze() | torch.cat([p, p])
torch.cat([p, h], 1) | torch.stack([p, h]) | torch.vstack([p, h]) | p.repeat(2, 1) | p.tile(2)
p.expand(2, *p.shape) | p.flip(0) | p.flip(1) | p.roll(1, 0) | p.rot90() | p.tril() | p.triu()
p.T @ p | p @ p.T | p @ h.T | h @ p.T | p @ v | torch.mv(p, v) | torch.mm(p, h.T)
torch.nn.functional.linear(h, p) | torch.nn.functional.linear(h, p, p[:, 0])
torch.outer(v, p[0]) | torch.nn.functional.embedding(torch.tensor([0]), p)
torch.einsum('ij,kj->ik', h, p) | p.T.matmul(h) | torch.addmm(h @ h.T, p, h.T)
torch.bmm(p[None], h.T[None]) | torch.baddbmm(s, p[None], h.T[None]) | torch.dist(p, h)
torch.cdist(p, h) | torch.nn.functional.cosine_similarity(p, h) | torch.dot(p[0], v)
torch.nn.functional.mse_loss(p, h) | torch.nn.functional.l1_loss(p, h) | torch.cov(p)
torch.corrcoef(p) | torch.nn.functional.cross_entropy(h @ p.T, torch.zeros(len(p)).long())
p.T.cov() | torch.linalg.svdvals(p) | torch.linalg.matrix_rank(p) | torch.linalg.qr(p.T)[1].abs()
torch.linalg.pinv(p) | torch.linalg.cond(p) | p + h | h + p | p - h | h - p | p * h | h * p
p / h | h / p | p ** 2 | 2 ** p | p * s | s * p | p + s | p + v | v + p | p * p | p + g | p @ g.T
p.abs() ** s.abs() | p % 0.7 | p // 0.7 | -p | p.abs() | p.sign() | +p | p > h | p < g | p == h
p != p | p.eq(h).all() | torch.equal(p, h) | torch.equal(p, p) | torch.equal(h, p)
torch.allclose(p, h) | torch.allclose(p, p) | torch.allclose(h, p) | torch.isclose(p, h)
p.isclose(p).all() | torch.where(m, p, h) | torch.where(p > 0, p, 0.0) | torch.where(p > h, p, g)
p.masked_fill(m, 0) | p.clamp(-1, 1) | p.clamp(min=h) | torch.maximum(p, h) | torch.minimum(h, p)
torch.lerp(p, h, 0.3) | torch.lerp(h, p, 0.3) | torch.lerp(h, p, s) | torch.addcmul(h, p, g)
torch.addcdiv(p, h, g.abs() + 1) | p.exp() | p.abs().log() | p.sin() | p.sigmoid() | p.tanh()
p.relu() | torch.nn.functional.gelu(p) | torch.nn.functional.silu(p) | p.round() | p.frac()
p.abs().sqrt() | p.abs().rsqrt() | p.erf() | p.floor() | p.nan_to_num() | torch.atan2(p, h)
p.hypot(h) | p.square() | (p > 0) & m | (p > 0).logical_or(m) | ~(p > 0) | (p > 0) ^ m
(p > 0) * p | p.long() | p.int() % 3 | p.bool() | (p > 0).long().sum() | p.detach() | p.clone()
p.contiguous() | p.data | p.to(torch.float32) | p.type(torch.float64) | p.is_contiguous()
torch.zeros_like(p) | torch.ones_like(p) | torch.full_like(p, 3.0) | p.new_zeros(p.shape)
p.new_zeros(3) | p.shape | p.new_full(p.shape, 2.0) | p.new_tensor([1.0]) | p.numel() | p.size(0)
p.dim() | p.element_size() | p.nelement() | torch._foreach_norm([p, g, h])
torch._foreach_norm([p, g], 1) | torch._foreach_mul([p, g], 2.0) | torch._foreach_mul([p], [h])
torch._foreach_add([h], [p]) | torch._foreach_mul([p, h], s) | torch._foreach_max([p, g])
torch._foreach_abs([p, h]) | torch._foreach_lerp([h, p], [p, h], 0.25)
torch._foreach_sqrt([p.abs()]) | torch._foreach_pow([p], 2)
torch.nn.utils.get_total_norm([p, g]) | torch.nn.utils.get_total_norm([p, h, g], 1.0)
torch.nn.utils.get_total_norm([g], float('inf')) | torch.nn.utils.parameters_to_vector([p, g])
torch.stack([x.norm() for x in (p, g, h)]).norm() | sum(x.pow(2).sum() for x in (p, g))
(p @ p.T - torch.eye(len(p))).pow(2).mean() | (p - p.mean()) / (p.std() + 1)
(p / p.norm()).sum(0) | p * (p > 0) - h | torch.nn.functional.dropout(p, 0.0)
torch.nn.functional.layer_norm(p, (p.shape[1],)) | torch.nn.functional.pad(p, (1, 1))
torch.nn.functional.rms_norm(p, (p.shape[1],), v)
torch.nn.functional.layer_norm(h, (p.shape[1],), p[0]) | p.fmod(0.3) | torch.kron(p[:1, :2], v)
torch.block_diag(p, p) | torch.bucketize(p, v.sort().values)
torch.searchsorted(v.sort().values, p) | torch.tensor_split(p, 2)
torch.broadcast_to(p, (2, *p.shape)) | torch.meshgrid(p[0], v, indexing='ij') | p.logit(0.1)
torch.real(p) | torch.is_nonzero(p.sum()) | torch.complex(p, p) | torch.polar(p, h)
p.movedim(0, 1) | p.swapaxes(0, 1)
torch.autograd.grad(p.pow(3).sum(), p)[0] if p.requires_grad else 0 | p.unfold(1, 2, 1)
p.heaviside(s) | p.ravel()
"""

WRITE = """
q.add_(h) | q.add_(g) | q.add_(h, alpha=-2) | q.sub_(s) | q.mul_(h) | q.mul_(s) | q.mul_(0.5)
q.div_(v) | q.copy_(h) | q.copy_(g) | q.fill_(2.0) | q.zero_() | q.clamp_(-1, 1) | q.lerp_(h, 0.3)
q.lerp_(g, s) | q.addcmul_(h, g) | q.addcdiv_(g, h) | q.masked_fill_(m, 0.0)
q.masked_fill_(q > 0, 1.0) | q.index_fill_(0, torch.tensor([0]), 3.0) | q.fill_diagonal_(7.0)
q.abs_() | q.index_add_(0, torch.tensor([0]), h[:1]) | q.index_copy_(0, torch.tensor([0]), h[:1])
q.masked_scatter_(m, h) | q.tril_() | q.pow_(2) | q.scatter_(0, torch.zeros(1, 2).long(), 5.0)
q.index_put_((torch.tensor([0]),), v) | q.add_(h.sum(0)) | q.sub_(q.mean())
q.__setitem__(0, 1.0) or q | q.__setitem__((0, 0), 5.0) or q | q.__setitem__(slice(0, 1), v) or q
q.__setitem__(m, 0.0) or q | q.__setitem__((slice(None), 0), 2.0) or q
q.__setitem__(q > 0, 0.0) or q | q.__setitem__(torch.tensor([0]), 4.0) or q
q[0].zero_() is None or q | q[:1].add_(1) is None or q | q[:, 0].mul_(3) is None or q
q.view(-1)[0].fill_(2) is None or q | q.t().add_(1) is None or q | q.t()[0].zero_() is None or q
q.flatten()[0].fill_(2) is None or q | q.data.mul_(2) is None or q
q.detach()[0].copy_(v) is None or q | q.narrow(0, 0, 1).zero_() is None or q
q.unbind(0)[0].zero_() is None or q | q.chunk(2)[0].zero_() is None or q
q.diagonal().zero_() is None or q | torch.nn.init.zeros_(q[0]) is None or q | h2.add_(p)
h2.mul_(0.9).add_(p, alpha=0.1) | h2.copy_(p) | h2.lerp_(p, 0.1) | h2.sub_(g) | h2.addcmul_(p, g)
h2.addcdiv_(p, g) | h2.__setitem__(0, p[0]) or h2 | h2.__setitem__(m, p[m]) or h2
h2.masked_fill_(p > 0, 0) | h2.addmm_(p, p.T @ h) | h2.div_(p)
torch._foreach_add_([h2], [p]) or h2 | torch._foreach_mul_([q, h2], s) or [q, h2]
torch._foreach_lerp_([h2, q], [p, h], 0.5) or [h2, q]
torch._foreach_addcdiv_([q], [g], [h], 0.1) or q
torch._foreach_copy_([q, h2], [h, p]) or [q, h2] | torch._foreach_zero_([q]) or q
torch.nn.utils.vector_to_parameters(h.flatten(), [q]) or q | q.requires_grad_(False)
"""


def lines(text: str) -> list[str]:
    return [e.strip() for line in text.strip().splitlines() for e in line.split(" | ")]
